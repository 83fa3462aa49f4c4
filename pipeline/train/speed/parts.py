"""The parts of a step by name, so that a trace shows where its time goes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from torch.profiler import record_function

Part = Literal[
    "data",  # waiting for the images of a step
    "colour",  # colours, blur and normalisation of the crops
    "teacher",  # its forward pass
    "targets",  # what is made of the teacher's answers
    "student forward",
    "loss",
    "backward",  # with the sum of the gradients over the workers, where there are several
    "clip",
    "finite check",  # with the sum of the scalars over the workers
    "optimizer",
    "teacher update",
]
_NOTHING = nullcontext()


class _Recording:
    on = False  # of this process: set while a trace is taken


def part(name: Part) -> AbstractContextManager[None]:
    """What is inside has this name in a trace; costs nothing where none is taken."""
    return record_function(name) if _Recording.on else _NOTHING


def record(on: bool) -> None:
    """Whether `part` marks anything from here on."""
    _Recording.on = on
