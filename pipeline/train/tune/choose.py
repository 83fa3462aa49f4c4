"""Freezes what `train.tune` does not let learn, in the student and in the teacher.

What is frozen is there once: student and teacher hold the same tensors, the teacher's average
leaves them out (`model.pair.ema_update`), the optimizer has no state of them, and a checkpoint has
them with the teacher alone (`frozen_names`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from pipeline.config.config import Config
from pipeline.config.training import Tune
from pipeline.errors import PipelineError
from pipeline.model.foreign import ForeignBackbone
from pipeline.model.low_rank import add_low_rank
from pipeline.model.pair import Backbone, Encoder, Pair, local_parts
from pipeline.train.parallel import blocks

BatchNorm = nn.modules.batchnorm._BatchNorm


def tuned(pair: Pair, config: Config) -> Pair:
    """The pair with what `train.tune` lets learn, in place; before it is prepared for its devices.

    * `last_blocks=N`: the last N blocks, and what comes after them (the last norm).
    * `lora(rank=R)`: updates of rank R, and where patches are hidden the mask token, which other
      people's weights do not bring.
    * `heads`: nothing of the backbone.

    BatchNorm that does not learn keeps its statistics as well, in student and teacher: with those
    of a batch it would be another network than the one that was loaded. `train.batch_norm=kept`
    says so of all BatchNorm of the backbone; its weights and biases learn.

    Args:
        pair: with the weights that training begins with, or to be restored from a checkpoint.
        config: the recipe.

    Raises:
        PipelineError: the backbone has no blocks that are known, or fewer; the rank is not low; it
            has no BatchNorm whose statistics could be kept.
    """
    tune = Tune.parse(config.train.tune)
    if config.train.batch_norm == "kept":
        _keep_statistics(pair)
    if tune.kind == "all":
        return pair
    backbone = pair.student.backbone.requires_grad_(False)
    if tune.kind == "last_blocks":
        for parameter in last_blocks(backbone, tune.number):
            parameter.requires_grad_(True)
    elif tune.kind == "lora":
        side = config.augment.global_size
        image = torch.zeros(1, config.model.in_channels, side, side)
        add_low_rank(backbone, tune.number, config.run.seed, f"train.tune={tune}", image=image)
        if config.loss.mask_probability and hasattr(backbone, "mask_token"):
            backbone.mask_token.requires_grad_(True)
    for module in backbone.modules():
        if isinstance(module, BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()
    pair.teacher = _sharing(pair.student)
    return pair


def with_running_means(backbone: nn.Module) -> list[nn.Module]:
    """The BatchNorm of a backbone that has statistics to keep."""
    norms = (module for module in backbone.modules() if isinstance(module, BatchNorm))
    return [norm for norm in norms if norm.track_running_stats]


def _keep_statistics(pair: Pair) -> None:
    norms = [norm for encoder in pair for norm in with_running_means(encoder.backbone)]
    if not norms:
        raise PipelineError(
            "train.batch_norm=kept, but the backbone has no BatchNorm with running means",
            "set train.batch_norm=batch, which changes nothing for it",
        )
    for norm in norms:
        norm.eval()


def last_blocks(backbone: Backbone, count: int) -> list[nn.Parameter]:
    """The parameters of the last blocks and of what comes after them. Blocks of a timm model are
    the layers that timm knows, of a module of one's own the row `blocks` or `stages` in it.

    Raises:
        PipelineError: no blocks are known, or there are fewer.
    """
    if isinstance(backbone, ForeignBackbone) and backbone.has_layers:
        layers, _ = backbone.layers()
        named = dict(backbone.named_parameters())
        # a layer of nothing but a norm is what comes after the blocks
        numbers = sorted({layers[name] for name, p in named.items() if p.ndim > 1} - {0})
        _check(len(numbers), count)
        return [p for name, p in named.items() if layers.get(name, 0) >= numbers[-count]]
    rows = blocks.of(backbone) or _stages(backbone)
    _check(len(rows), count)
    first = next(rows[-count].parameters())
    every = list(backbone.parameters())
    begin = next(number for number, p in enumerate(every) if p is first)
    return every[begin:]


def _stages(backbone: Backbone) -> Sequence[nn.Module]:
    """What a module of one's own calls `stages`, where it is a row of modules."""
    stages = getattr(getattr(backbone, "module", None), "stages", ())
    return list(stages) if isinstance(stages, nn.ModuleList | nn.Sequential) else []


def _check(known: int, count: int) -> None:
    if not known:
        raise PipelineError(
            f"train.tune=last_blocks={count}: no blocks of this encoder are known",
            "give the module a row of blocks (nn.Sequential) called blocks, or set "
            "train.tune=lora(rank=8), train.tune=heads or train.tune=all",
        )
    if count > known:
        raise PipelineError(
            f"train.tune=last_blocks={count}, but this encoder has {known} blocks",
            f"set train.tune=last_blocks={max(1, known // 4)}, or train.tune=all",
        )


def _sharing(student: Encoder) -> Encoder:
    """A teacher that is equal to the student, of which it has the frozen parameters themselves."""
    shared = {id(p): p for p in student.parameters() if not p.requires_grad}
    teacher = copy.deepcopy(student, dict(shared)).requires_grad_(False).eval()
    modules = zip(student.modules(), teacher.modules(), strict=True)
    for ours, theirs in modules:
        if isinstance(theirs, BatchNorm):  # as `model.pair.pair_of`, where it learns
            theirs.train(ours.training)
    return teacher


def frozen_names(student: Encoder) -> set[str]:
    """The names of the tensors that do not change while training; of all weights: none."""
    names = {name for name, p in student.named_parameters() if not p.requires_grad}
    return names | {
        f"{path}.{name}"
        for path, module in student.named_modules()
        if isinstance(module, BatchNorm) and not module.training
        for name, _ in module.named_buffers(recurse=False)
    }


@torch.no_grad()
def take_frozen(pair: Pair) -> None:
    """Gives the student what is frozen in the teacher, where it is not the same tensor: after a
    checkpoint, and where tensors are split over the workers.
    """
    names = sorted(frozen_names(pair.student))
    states = (encoder.state_dict() for encoder in pair)
    student, teacher = (local_parts([state[name] for name in names]) for state in states)
    for ours, theirs in zip(student, teacher, strict=True):
        if ours.data_ptr() != theirs.data_ptr():
            ours.copy_(theirs)
