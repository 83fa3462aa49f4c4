"""Reads a recipe: YAML file, `a.b=value` overrides, one validation that lists every error."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.errors import ConfigError


def load(arguments: Sequence[str]) -> Config:
    """The config of a command line `[recipe.yaml] [a.b=value …]`.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    recipes = [a for a in arguments if "=" not in a]
    if len(recipes) > 1:
        raise ConfigError(
            f"more than one recipe: {', '.join(recipes)}",
            "give one YAML file; everything else as a.b=value",
        )
    values: dict[str, Any] = read_recipe(recipes[0]) if recipes else {}
    problems: list[str] = []
    for argument in arguments:
        if "=" in argument:
            try:
                _assign(values, argument)
            except ConfigError as error:
                problems.append(error.what)
    if recipes:
        run = values.setdefault("run", {})
        if isinstance(run, dict):
            run["name"] = run.get("name") or Path(recipes[0]).stem
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for one in error.errors():
            path, message = _sentence(dict(one))
            found.setdefault(path, []).append(message)
        problems += [f"{path}: " * bool(path) + ", or: ".join(m) for path, m in found.items()]
    if problems:
        raise ConfigError("\n".join(problems), "python jobs/<stage>.py --help lists every field")
    return config


def read_recipe(path: str) -> dict[str, Any]:
    """The mapping in a YAML recipe.

    Raises:
        ConfigError: where the file is missing, is not YAML or holds no mapping.
    """
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(
            file.name, [p.name for p in Path("configs").glob("*.yaml")]
        )
        hint = f"did you mean configs/{near[0]}?" if near else "recipes are in configs/*.yaml"
        raise ConfigError(f"no recipe at {path} (an override is written a.b=value)", hint)
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path} is not YAML{place}: {getattr(error, 'problem', error)}"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected `section:` mappings")
    # a section whose fields are all commented out is an empty one
    return {name: {} if value is None else value for name, value in values.items()}


def field_paths(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf field as (`a.b`, pydantic FieldInfo), in order."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from field_paths(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def describe() -> str:
    """All fields with default and meaning, for `--help`."""
    lines = []
    section = ""
    for path, field in field_paths():
        head, _, name = path.rpartition(".")
        if head != section:
            section = head
            lines.append(f"\n{section}")
        default = field.default
        shown = list(default) if isinstance(default, tuple) else default
        shown = "" if shown is None or shown == "" else f" [{shown}]"
        lines.append(f"  {name:<20} {field.description}{shown}")
    return "\n".join(lines)


def _assign(values: dict[str, Any], argument: str) -> None:
    path, _, text = argument.partition("=")
    if text.lstrip().startswith("{"):
        raise ConfigError(f"{path}: give its fields one by one, e.g. {path}.<field>=value")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    if _is_text(path) and not isinstance(value, str):
        value = text  # a folder may be called 2026 or no
    *parents, leaf = path.split(".")
    node = values
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{path}: no such field{_suggestion(path)}")
        node = child
    node[leaf] = value


def _is_text(path: str) -> bool:
    return any(name == path and field.annotation is str for name, field in field_paths())


def _sentence(error: dict[str, Any]) -> tuple[str, str]:
    """One pydantic error as (`a.b`, what is wrong)."""
    known = {name for name, _ in field_paths()}
    parts = [str(part) for part in error["loc"]]
    # the last places of an error may name the member of a union or an index: keep the field's path
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in known:
            parts = parts[:end]
            break
    path = ".".join(parts)
    if error["type"] == "extra_forbidden":
        return path, f"no such field{_suggestion(path)}"
    if error["type"] in {"model_type", "model_attributes_type"}:
        return path, f"is a section, give its fields as {path}.<field>=value"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return path, message
    return path, f"{message} (got {error['input']!r})"


def _suggestion(path: str) -> str:
    known = [name for name, _ in field_paths()]
    sections = sorted({name.rpartition(".")[0] for name in known})
    near = difflib.get_close_matches(path, known + sections, n=1, cutoff=0.6)
    if not near:  # right name, wrong section
        leaf = path.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == leaf][:1]
    return f"; did you mean {near[0]}?" if near else ""
