"""What a worker holds of the networks in bytes, by what it is for. Arithmetic; on GPUs it has not
been measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from torch import nn

from pipeline.model.pair import Encoder, Pair
from pipeline.train.parallel.shards import groups_of, products_of
from pipeline.train.parallel.strategy import Layout

FULL, HALF = 4, 2  # bytes of a number in fp32 and in bfloat16
IN_FLIGHT = 2  # groups whose whole weights are there at once: the one at work, and the next one


@dataclass(frozen=True)
class StateBytes:
    """Of one worker; the same in each step, whatever the images."""

    student: int
    gradients: int  # what is kept of them until the update
    moments: int  # AdamW's two
    teacher: int
    frozen: int  # the frozen teacher; one of features is whole on each worker
    gathered: int  # FSDP: whole weights and whole gradients of what is at work
    lower: int  # copies of weights in bfloat16, which autocast keeps for the backward pass

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))


def state_bytes(pair: Pair, layout: Layout, accumulation: int) -> StateBytes:
    """What a worker of a layout holds of a pair, which need not be prepared.

    With FSDP and `accumulation` above 1 each worker holds the whole gradients of the micro batches
    before the last, for they are sent once a step.
    """
    encoders = [encoder for encoder in (*pair, pair.frozen) if encoder is not None]
    student, teacher, *frozen = (FULL * numbers(encoder.parameters()) for encoder in encoders)
    learnt = FULL * numbers(learning(pair.student))
    if not layout.sharded:  # of a tensor in both, each worker has a slice for each
        ours = {id(p) for p in pair.student.parameters()}
        teacher = FULL * numbers(p for p in pair.teacher.parameters() if id(p) not in ours)
    share = layout.workers if layout.sharded else 1
    half = layout.precision is not None
    gathered = gradients = lower = 0
    if layout.sharded:
        gathered = max(_whole(encoder, half) for encoder in encoders)
        # of the group at work: as the backward pass gives them, and as they are sent
        largest = max(_travelling(pair.student, group, half) for group in groups_of(pair.student))
        sent = layout.reduce.itemsize
        gathered += largest + sent * max(numbers(group) for group in groups_of(pair.student))
        gradients = learnt * sent // FULL if accumulation > 1 else 0
    elif half:
        lower = HALF * numbers(products_of(pair.student))
    return StateBytes(
        student=student // share,
        gradients=learnt // share + gradients,
        moments=2 * learnt // share,
        teacher=teacher // share,
        frozen=sum(frozen) // share
        + (pair.feature_teacher.weight_bytes if pair.feature_teacher else 0),
        gathered=gathered,
        lower=lower,
    )


def activations(block: float, tokens: float, depth: int, layout: Layout) -> float:
    """Numbers that the student keeps for its backward pass, in its blocks.

    Args:
        block: what one block keeps.
        tokens: numbers in the tokens between two blocks.
        depth: blocks that a gradient reaches.
        layout: says whether blocks are computed again; then all but one keep their input alone.
    """
    return depth * tokens + min(1, depth) * block if layout.checkpointing else depth * block


def learning(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def numbers(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers are in all of them."""
    return sum(parameter.numel() for parameter in parameters)


def _whole(encoder: Encoder, half: bool) -> int:
    """Bytes of the whole weights that are there at once: the rest, and the largest groups."""
    *groups, others = (_travelling(encoder, group, half) for group in groups_of(encoder))
    return others + sum(sorted(groups)[-IN_FLIGHT:])


def _travelling(encoder: Encoder, group: list[nn.Parameter], half: bool) -> int:
    """Bytes of the weights of a group in the types in which they are sent."""
    lower = {id(p) for p in products_of(encoder)} if half else set()
    return sum(p.numel() * (HALF if id(p) in lower else FULL) for p in group)
