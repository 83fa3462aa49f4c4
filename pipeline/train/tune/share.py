"""How much of a pair learns, and what that takes; for the plan."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.model.pair import Pair
from pipeline.train.parallel.memory import FULL, learning, numbers

MIB = 2**20


@dataclass(frozen=True)
class Share:
    """Numbers of weights, and bytes in fp32; `…_of_all` as with `train.tune=all`."""

    backbone: int  # weights of it that learn
    backbone_of_all: int
    every: int  # weights that learn, with heads
    every_of_all: int
    checkpoint: int  # bytes
    checkpoint_of_all: int

    @property
    def optimizer(self) -> int:
        """Bytes of AdamW's two states."""
        return 2 * FULL * self.every

    @property
    def optimizer_of_all(self) -> int:
        """Bytes of AdamW's two states, if all learnt."""
        return 2 * FULL * self.every_of_all


def share(pair: Pair) -> Share:
    """Of a pair that `choose.tuned` has gone over. Updates of low rank are in what learns, and not
    among all weights: merged they are none.
    """
    student = pair.student
    updates = sum(p.numel() for name, p in student.named_parameters() if ".low_rank_" in name)
    learnt, every = numbers(learning(student)), numbers(student.parameters()) - updates
    return Share(
        backbone=numbers(learning(student.backbone)),
        backbone_of_all=numbers(student.backbone.parameters()) - updates,
        every=learnt,
        every_of_all=every,
        checkpoint=checkpoint_bytes(pair),
        checkpoint_of_all=4 * FULL * every,
    )


def checkpoint_bytes(pair: Pair) -> int:
    """Of the teacher with all weights, and of the student and AdamW's two states what learns."""
    return FULL * (numbers(pair.teacher.parameters()) + 3 * numbers(learning(pair.student)))


def said(pair: Pair) -> str:
    """The same in a line, with what it would be if all learnt."""
    of = share(pair)
    return (
        f"{_of(of.backbone, of.backbone_of_all, 10**6, 'M')} weights of the backbone learn, "
        f"{_of(of.every, of.every_of_all, 10**6, 'M')} with heads; AdamW's states "
        f"{_of(of.optimizer, of.optimizer_of_all, MIB, 'MiB')}, a checkpoint "
        f"{_of(of.checkpoint, of.checkpoint_of_all, MIB, 'MiB')}"
    )


def _of(part: int, whole: int, unit: int, name: str) -> str:
    return f"{part / unit:.2f} of {whole / unit:.2f} {name} ({100 * part / whole:.1f} %)"
