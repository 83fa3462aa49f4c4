"""The recipe as a file: facts on top, a reason behind each value; never over a file of others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.adapt.recipe import flow, set_values
from pipeline.config.config import Config
from pipeline.errors import ConfigError, StorageError
from pipeline.start.choose import Choice
from pipeline.storage.run_folder import atomic
from pipeline.uri import public

MARK = "# Written by jobs/start.py"
WIDTH = 100
LEFT = ("start",)  # sections that are this job's own


def text_of(choice: Choice, facts: Sequence[str]) -> str:
    """The YAML.

    Args:
        choice: the recipe.
        facts: of the images and the machine, a line each.
    """
    reasons = {line.field: line.reason for line in choice.recipe.lines}
    lines = [
        f"{MARK} for {_one_line(public(choice.config.data.source))}; jobs/run.py takes it.",
        "#",
        *(f"# {_one_line(fact)}" for fact in facts),
        f"# So: {choice.name}. {choice.why[:1].upper()}{choice.why[1:]}.",
        "#",
        "# Change what you like here, or as section.field=value on the command line.",
    ]
    for section, fields in set_values(choice.config).items():
        if section in LEFT or fields == {}:
            continue
        if not isinstance(fields, dict):
            lines.append(f"{section}: {flow(fields)}")
            continue
        lines.append(f"{section}:")
        for name, value in fields.items():
            said = f"  {name}: {flow(_short(value))}"
            reason = reasons.get(f"{section}.{name}", "as you set it")
            lines.append(f"{said}  # {_one_line(reason)}")
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    """A comment, whatever the names of folders in it hold."""
    return " ".join(text.split())


def _short(value: Any) -> Any:
    """`200` for `200.0`; rates and shares keep their point."""
    return int(value) if isinstance(value, float) and value >= 2 and value.is_integer() else value


def place_of(config: Config) -> Path:
    """The file to write: `start.recipe`, or the name of the folder of images."""
    if config.start.recipe:
        name = config.start.recipe
        return Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    name = PurePosixPath(config.data.source.partition(",")[0].partition("*")[0].rstrip("/")).name
    name = name.partition(":")[2] or name if ":" in name else name
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in name.partition(".")[0])
    return Path(f"{stem.strip('-') or 'images'}.yaml")


def _free(path: Path) -> Path:
    """A name beside it that nothing has: `photos.yaml.before`, `photos.yaml.before-2`, …"""
    names = (f"{path.name}.before{f'-{n}' * (n > 1)}" for n in count(1))
    return next(one for name in names if not (one := path.with_name(name)).exists())


def check(path: Path) -> None:
    """Refuses a place where a recipe may not be written, before anything is.

    Raises:
        ConfigError: a file of somebody else is there.
        StorageError: it cannot be read.
    """
    _earlier(path)


def _earlier(path: Path) -> str | None:
    """The text of an earlier start at a place; None where nothing is."""
    try:
        if not path.exists():
            return None
        before = path.read_text(errors="replace") if path.is_file() else ""
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read: {error.strerror}",
            "name a file where you may read and write: recipe=NAME.yaml",
        ) from None
    if not before.startswith(MARK):
        raise ConfigError(
            f"{path} is there and was not written by jobs/start.py",
            "name another file: recipe=NAME.yaml",
        )
    return before


def write(path: Path, text: str) -> str:
    """Writes the file. Returns what became of one that was there, in words.

    One of an earlier start is kept beside it, with what was changed in it since; one of somebody
    else's is not touched. It is moved once the new text is on the disk, so that a disk without
    room leaves it where it is.

    Raises:
        ConfigError: such a file is there.
        StorageError: the folder cannot be written, or the file cannot be read.
    """
    before, said = _earlier(path), ""
    if before == text:
        return "the same as before"
    try:
        with atomic(path) as temporary:
            temporary.write_text(text)
            if before is not None:
                kept = _free(path)
                path.replace(kept)
                said = f"the earlier one is now {kept}"
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror}",
            "name a file where you may write: recipe=NAME.yaml",
        ) from None
    return said
