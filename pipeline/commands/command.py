"""What a command is; `python jobs/NAME.py` and `raydino NAME` are two ways to type one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Command:
    """A command of the project.

    Attributes:
        name: of the file in `jobs/`, and behind `raydino`.
        stages: names in `pipeline.stages.ORDER`, or `doctor`, `serve`, `start` or `sync` alone.
        what: it does, in a sentence.
        examples: three to five ways to type it.
        more: lines on what it reads and writes.
        fields: that people set, about ten; `--help` shows them.
        shorthand: short names of this command for fields, `{"model": "embed.model"}`; under `""`
            the list field that takes what is neither a recipe nor `name=value`.
        words: fields that take such words instead, one each, in this order.
        recipe: that is read where none is named.
        implied: `name=value` that this command means whatever a recipe says; the command line may
            say otherwise.
        flags: its own options beside `--dry-run` and `--help`.
    """

    name: str
    stages: tuple[str, ...]
    what: str
    examples: tuple[str, ...] = ()
    more: str = ""
    fields: tuple[str, ...] = ()
    shorthand: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    recipe: str = ""
    implied: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
