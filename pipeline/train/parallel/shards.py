"""FSDP2: a slice of every tensor on each worker (`torch.distributed.fsdp.fully_shard`).

Student, teacher and frozen teacher are cut alike, so that slices of the same numbers lie on the
same worker: the teacher's average needs no other worker. One group of tensors is sent at once: a
block, a head, or the rest (embeddings and the last norm).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pipeline.errors import PipelineError
from pipeline.model.pair import Encoder, Pair
from pipeline.train.parallel import blocks


@dataclass(frozen=True)
class Policy:
    """Who shares, and in which types tensors travel."""

    device: torch.device
    workers: int
    precision: torch.dtype | None  # of autocast; None: it is off
    reduce: torch.dtype


def shard(pair: Pair, policy: Policy) -> None:
    """Splits all encoders of a pair over the workers, in place; weights move to the device.

    Raises:
        PipelineError: there is no group of workers, or one that cannot send slices.
    """
    backend = dist.get_backend() if dist.is_initialized() else ""
    if not backend or (policy.device.type == "cuda" and "nccl" not in backend):
        raise PipelineError(
            f"train.strategy=fsdp found {backend or 'no'} process group on {policy.device.type}",
            "give each worker a GPU of its own (resources.gpus_per_worker=1) or set "
            "train.strategy=ddp",
        )
    # Its warning is of tensors that are changed in place after a forward, which nobody does here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(policy.device.type, (policy.workers,))
    for encoder in (pair.student, pair.teacher, pair.frozen):
        if encoder is None:
            continue
        types = _types(encoder, policy)
        student = encoder is pair.student
        for part in _parts(encoder):
            fully_shard(part, mesh=mesh, mp_policy=types, reshard_after_forward=True)
        # The student's rest is needed again at the end of the backward pass; the teacher has none.
        fully_shard(encoder, mesh=mesh, mp_policy=types, reshard_after_forward=not student)


def products_of(encoder: Encoder) -> list[nn.Parameter]:
    """The parameters that autocast uses in its own type, and in no other."""
    return [
        parameter
        for module in encoder.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for parameter in module.parameters(recurse=False)
    ]


def groups_of(encoder: Encoder) -> list[list[nn.Parameter]]:
    """The parameters that are sent together: of each block, of each head, and last the rest."""
    groups = [list(part.parameters()) for part in _parts(encoder)]
    inside = {id(parameter) for group in groups for parameter in group}
    return [*groups, [p for p in encoder.parameters() if id(p) not in inside]]


def _parts(encoder: Encoder) -> list[nn.Module]:
    heads = (encoder.dino_head, encoder.ibot_head, encoder.adapter)
    return [*blocks.of(encoder.backbone), *(head for head in heads if head is not None)]


def _types(encoder: Encoder, policy: Policy) -> MixedPrecisionPolicy:
    """The types in which weights and gradients travel.

    Autocast computes products in the lower type, so their weights travel in it and nothing changes.
    All else (norms, LayerScale, tokens, prototypes) is used in fp32, and travels so.
    """
    products = {id(parameter) for parameter in products_of(encoder)}

    def exception(parameter: nn.Parameter) -> torch.dtype | None:
        return None if id(parameter) in products else parameter.dtype

    return MixedPrecisionPolicy(
        param_dtype=policy.precision,
        reduce_dtype=policy.reduce,
        cast_forward_inputs=False,  # autocast does
        param_dtype_override_fn=exception if policy.precision else None,
    )


def is_sharded(module: object) -> bool:
    """Whether a module's weights are split over the workers."""
    return isinstance(module, FSDPModule)


def set_adding_up(module: object, on: bool) -> None:
    """Whether the next backward pass adds up the workers' gradients, or keeps this worker's own."""
    assert isinstance(module, FSDPModule)
    module.set_requires_gradient_sync(on)
    module.set_is_last_backward(on)


def whole(value: Tensor | Any) -> Tensor:
    """A tensor put together from its slices; all workers call this together."""
    return value.full_tensor() if isinstance(value, DTensor) else value
