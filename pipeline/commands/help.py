"""What `--help` says: one screen; `--help=all` every field; `--help=data` one section."""

from __future__ import annotations

import difflib
import textwrap
from typing import Any

from pipeline.commands.command import Command
from pipeline.commands.table import COMMANDS
from pipeline.config.load import describe, field_paths
from pipeline.errors import ConfigError

WIDTH = 100
PLACES = (
    "Relative paths, in a recipe too, count from the folder where the job is started. "
    "A recipe that is\nnot there is looked for among the project's own (configs/)."
)
FOOTER = (
    "--dry-run says what it would take and writes nothing. --help=all lists every field,",
    "--help=data those of a section. Recipes go by their names: demo is configs/demo.yaml.",
)


def screen(command: Command) -> str:
    """`--help`: what it does, how it is typed, and the fields that people set."""
    lines = [command.what, "", *(f"  {example}" for example in command.examples)]
    if command.more:
        lines += ["", *command.more.strip().splitlines()]
    if command.fields:
        lines += ["", *_fields(command), *FOOTER]
    return "\n".join(lines)


def everything(command: Command) -> str:
    """`--help=all`: the screen's first part, and all fields of all sections."""
    short = [f"{name} for {field}" for name, field in command.shorthand.items() if name]
    names = textwrap.fill(f"Short names here: {', '.join(short)}.", WIDTH) if short else ""
    head = [command.what, *(f"  {example}" for example in command.examples)]
    parts = ["\n".join(head), command.more.strip(), PLACES, names]
    fields = f"Fields (section.field=value) [default]:{describe()}"
    return "\n\n".join(part for part in [*parts, fields] if part)


def section(name: str) -> str:
    """`--help=data`: the fields of a section.

    Raises:
        ConfigError: there is no such section.
    """
    text = describe(name)
    if text:
        return f"Fields (section.field=value) [default]:{text}"
    sections = list(dict.fromkeys(path.rpartition(".")[0] for path, _ in field_paths()))
    near = difflib.get_close_matches(name, [*sections, "all"], 1)
    hint = f"did you mean --help={near[0]}?" if near else f"sections: {', '.join(sections[1:])}"
    raise ConfigError(f"no section {name}", hint)


def index(version: str) -> str:
    """What `raydino` alone says."""
    lines = [
        f"raydino {version}: images in, a DINOv2 backbone out.",
        "",
        *(f"  raydino {one.name:<9} {one.what}" for one in COMMANDS.values()),
        "",
        "raydino start photos/ is where to begin; raydino run demo needs no images of yours.",
        "raydino COMMAND --help says more.",
    ]
    return "\n".join(lines)


def nearest_command(name: str) -> str:
    """The command that is written most like it; "" where none is."""
    return next(iter(difflib.get_close_matches(name, COMMANDS, 1)), "")


def _fields(command: Command) -> list[str]:
    known = dict(field_paths())
    short = {field: name for name, field in reversed(list(command.shorthand.items())) if name}
    names = {path: short.get(path, path) for path in command.fields}
    width = max(map(len, names.values()))
    lines = []
    for path, name in names.items():
        shown = _default(known[path].default)
        default = f" [{shown}]" if shown else ""
        text = str(known[path].description)
        room = WIDTH - width - 4 - len(default)
        lines.append(f"  {name:<{width}}  {_cut(text, room)}{default}")
    return lines


def _default(value: Any) -> str:
    if value is None or value == "" or value == ():
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)


def _cut(text: str, most: int) -> str:
    """A text that is not longer than that: without its last clauses, or else its last words."""
    if len(text) <= most:
        return text
    clauses = [end for end, letter in enumerate(text[:most]) if letter in ";:,"]
    if clauses and clauses[-1] > most // 3:
        return text[: clauses[-1]]
    return f"{text[: most - 1].rpartition(' ')[0]}…"
