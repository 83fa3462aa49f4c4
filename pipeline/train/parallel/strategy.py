"""How the workers of a group hold student and teacher together: the one place that knows DDP from
FSDP.

DDP: each worker holds all weights, gradients and moments, and adds up gradients in the last
backward pass of a step. FSDP (PyTorch's FSDP2): each holds a slice of every tensor, and a block's
whole weights while the block computes. Both do the same mathematics: `tests/train/parallel` holds
them against each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.loss.collectives import all_sum
from pipeline.model.pair import Backbone, Encoder, Pair, local_parts
from pipeline.train.parallel import blocks, shards

BUCKET_BYTES = 25 * 2**20  # at least: torch's own size of what DDP adds up at once
BUCKET_LIMIT = 128 * 2**20
# What DDP calls buffers that rank 0 sends to all before each forward pass: torch 2.15 renamed it.
_NAMES = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNCED = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"


@dataclass(frozen=True)
class Layout:
    """How a group computes: what the plan says of devices, types and memory."""

    workers: int
    device: torch.device
    strategy: Literal["ddp", "fsdp"] = "ddp"
    precision: torch.dtype | None = None  # of autocast; None: it is off
    reduce: torch.dtype = torch.float32  # type in which gradients are added up
    residual: torch.dtype = torch.float32  # of the tokens between two blocks
    compile: bool = False
    checkpointing: bool = False  # blocks are computed again in the backward pass

    @property
    def sharded(self) -> bool:
        """Whether weights are split: one worker alone has nobody to split them with."""
        return self.strategy == "fsdp" and self.workers > 1


def prepare(pair: Pair, layout: Layout) -> Pair:
    """Brings a pair into the form that training needs, in place and on its device; before the
    optimizer is made, and on all workers alike.

    With FSDP all workers must hold the same weights already: each keeps its slice, and nothing is
    sent. The networks cannot be copied (`deepcopy`) afterwards.

    Raises:
        PipelineError: something that these networks or devices cannot do, with the field's name.
    """
    for encoder in (pair.student, pair.teacher, pair.frozen):
        if encoder is None:
            continue
        blocks.set_residual(encoder.backbone, layout.residual)
        if layout.checkpointing and encoder is pair.student:
            blocks.set_checkpointing(encoder.backbone)
        if layout.compile:
            blocks.compile_blocks(encoder.backbone)
    # A teacher of features is whole on each worker, whatever the strategy.
    network = pair.feature_teacher and pair.feature_teacher.network
    if layout.compile and isinstance(network, Backbone):
        blocks.compile_blocks(network)
    if layout.sharded:
        policy = shards.Policy(layout.device, layout.workers, layout.precision, layout.reduce)
        shards.shard(pair, policy)
    return pair.to(layout.device)


def student_forward(pair: Pair, layout: Layout) -> nn.Module:
    """The student as its workers call it.

    DDP sends rank 0's weights to all when it is made: load a checkpoint before. `static_graph`
    stays off: it spares a search for unused parameters that is off anyway, as every parameter has a
    gradient in every step (`Head`, `VisionTransformer.tokens`).
    """
    student = pair.student
    if layout.sharded or layout.workers == 1:
        return student
    ids = [layout.device.index] if layout.device.type == "cuda" else None
    # running means of BatchNorm are each worker's own, see `pair_of`
    own_buffers: dict[str, Any] = {_SYNCED: False}
    wrapped = DistributedDataParallel(
        student,
        device_ids=ids,
        gradient_as_bucket_view=True,  # no second copy of the gradients
        **own_buffers,
        bucket_cap_mb=bucket_bytes(student) / 2**20,
    )
    if layout.reduce == torch.bfloat16:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def bucket_bytes(student: Encoder) -> int:
    """Bytes of gradients that DDP adds up at once: those of one block.

    The gradients of a compiled block come all together, at the end of its backward pass. Smaller
    buckets would start no earlier and be more sums, whose start counts where there are many
    workers; larger ones would leave more to wait for after the last block.
    """
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks.of(student.backbone)]
    return min(max([BUCKET_BYTES, *sizes]), BUCKET_LIMIT)


@contextmanager
def adding_up(forward: object, last: bool) -> Iterator[None]:
    """Around forward and backward of a micro batch: workers add up gradients in the `last` one of a
    step only. Before it a worker holds the sum of its own, with FSDP too.
    """
    if shards.is_sharded(forward):
        shards.set_adding_up(forward, last)
    elif not last and hasattr(forward, "no_sync"):  # DDP, or what a loop of one's own wraps
        with forward.no_sync():
            yield
        return
    yield


@torch.no_grad()
def clip(student: Encoder, limit: float) -> dict[str, Tensor]:
    """Limit the gradient norm of each child of the student by itself; of one that is frozen there
    is none.

    Returns:
        The norms before that, 0-d by the child's name, over all workers' slices and equal on all.
    """
    children = {
        name: list(module.parameters())
        for name, module in student.named_children()
        if any(p.requires_grad for p in module.parameters())
    }
    if not shards.is_sharded(student):
        return {
            name: nn.utils.clip_grad_norm_(parameters, limit)
            for name, parameters in children.items()
        }
    gradients = {
        name: [p.grad for p in parameters if p.grad is not None]
        for name, parameters in children.items()
    }
    local = {name: local_parts(each) for name, each in gradients.items()}
    squares = [torch.stack(torch._foreach_norm(each)).square().sum() for each in local.values()]
    norms = all_sum(torch.stack(squares)).sqrt()
    for each, norm in zip(local.values(), norms, strict=True):
        # as `clip_grad_norm_` does, without a wait for the norm
        torch._foreach_mul_(each, (limit / (norm + 1e-6)).clamp(max=1.0))
    return dict(zip(local, norms.unbind(), strict=True))


def whole_weights(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Copies of all tensors of a module on the CPU, by name, whatever the strategy.

    All workers must call it together; each tensor is put together once and then let go.

    Args:
        module: any part of a pair.
        keep: whether this worker wants them; the others get {}.
    """
    weights: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        whole = shards.whole(value)
        if keep:
            weights[name] = whole.detach().to("cpu", copy=True)
    return weights
