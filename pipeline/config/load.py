"""Reads a recipe: YAML file, `a.b=value` overrides, one validation that lists every error."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.config import curation_rules, recipe_yaml
from pipeline.config.config import Config
from pipeline.config.recipe_yaml import SHOWN, Unreadable
from pipeline.errors import ConfigError, shortened
from pipeline.uri import public

log = logging.getLogger("pipeline")
CURATION = ("curate", *curation_rules.SECTIONS)
ROOT = Path(__file__).resolve().parents[2]  # of a clone, whose recipes are in configs/
PACKED = Path(__file__).resolve().parents[1] / "configs"  # where an installed package has them
RECIPES = PACKED if PACKED.is_dir() else ROOT / "configs"


def load(arguments: Sequence[str]) -> Config:
    """The config of a command line `[recipe.yaml] [a.b=value …]`.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    overrides = [a for a in arguments if "=" in a and "/" not in a.partition("=")[0]]
    recipes = [a for a in arguments if a not in overrides]
    if len(recipes) > 1:
        raise ConfigError(
            f"more than one recipe: {', '.join(recipes)}",
            "give one YAML file; everything else as a.b=value",
        )
    values: dict[str, Any] = read_recipe(recipes[0]) if recipes else {}
    if "curate.preset=" in overrides:  # switched off, with all that the recipe says of it
        values = {name: value for name, value in values.items() if name not in CURATION}
    problems: list[str] = []
    seen: dict[str, str] = {}
    for argument in overrides:
        path, _, text = argument.partition("=")
        if seen.get(path, text) != text:
            log.warning(
                "%s is given twice, %s and %s: the last one counts",
                *map(_shown, (path, seen[path], text)),
            )
        seen[path] = text
        try:
            _assign(values, path, text)
        except ConfigError as error:
            problems.append(error.what)
    if recipes:
        run = values.setdefault("run", {})
        if isinstance(run, dict) and run.get("name") in (None, ""):
            run["name"] = Path(recipes[0]).stem
    problems += _misread(values)
    return checked(values, problems)


def checked(values: Mapping[str, Any], problems: Sequence[str] = ()) -> Config:
    """The config of values by section.

    Args:
        values: of fields; others have their defaults.
        problems: found before, told with the others.

    Raises:
        ConfigError: with every problem, one a line.
    """
    problems = list(problems)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        messages: dict[str, list[str]] = {}
        for one in error.errors():
            path, message = _sentence(dict(one))
            messages.setdefault(path, []).append(message)
        problems += [f"{path}: " * bool(path) + ", or: ".join(m) for path, m in messages.items()]
    if problems:
        raise ConfigError(
            "\n".join(problems), "python jobs/<stage>.py --help=all lists every field"
        )
    return config


def read_recipe(path: str) -> dict[str, Any]:
    """The mapping in a YAML recipe.

    Raises:
        ConfigError: where the file is missing, is not YAML or holds no mapping.
    """
    shown = _shown(path, 200)
    try:
        file = recipe_at(path)
        content = file.read_bytes() if file.is_file() else None
    except (OSError, ValueError) as error:  # no right to read it, a name too long, or with a NUL
        raise ConfigError(f"the recipe {shown} cannot be read: {_reason(error)}") from None
    if content is None:
        raise ConfigError(
            f"no recipe at {shown} (an override is written a.b=value)", _instead(file)
        )
    text = recipe_yaml.decoded(content, shown)
    try:
        values = recipe_yaml.parsed(text, _is_text)
    except Unreadable as error:
        place = ", line" if error.yaml else " is not YAML at line"
        raise ConfigError(f"{shown}{place} {error.line}: {error.why}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{shown} holds a {type(values).__name__}, expected `section:` mappings")
    # a section whose fields are all commented out is an empty one
    return {
        name: {} if value is None and name in _sections() else value
        for name, value in values.items()
    }


def _instead(file: Path) -> str:
    """What somebody meant who named a recipe that is not there."""
    if file.is_dir():
        return f"that is a folder; python jobs/start.py {file} writes a recipe for its images"
    place = Path("configs") if Path("configs").is_dir() else RECIPES
    for folder, recipes in ((file.parent, file.parent), (place, RECIPES)):
        names = [one.name if file.suffix else one.stem for one in recipes.glob("*.yaml")]
        if near := difflib.get_close_matches(file.name, names):
            return f"did you mean {folder / near[0].removesuffix('.yaml')}.yaml?"
    return f"recipes are in {place}/*.yaml"


def recipe_at(path: str) -> Path:
    """The file of a recipe: in the current folder, or where the project has one of that name, which
    is `demo`, `demo.yaml` or `configs/demo.yaml`.
    """
    name = path.removeprefix("configs/")
    ours = RECIPES / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if Path(path).is_file() or "/" in name or not ours.is_file():
        return Path(path)
    log.info("recipe      %s", ours)
    return ours


def field_paths(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf field as (`a.b`, pydantic FieldInfo), in order."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from field_paths(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def describe(only: str = "") -> str:
    """All fields with default and meaning, or those of one section; "" where there is none."""
    lines = []
    section = ""
    for path, field in field_paths():
        head, _, name = path.rpartition(".")
        if only and head != only:
            continue
        if head != section:
            section = head
            lines.append(f"\n{section}")
        default = field.default
        shown = list(default) if isinstance(default, tuple) else default
        shown = "" if shown is None or shown == "" else f" [{shown}]"
        lines.append(f"  {name:<20} {field.description}{shown}")
    return "\n".join(lines)


def _assign(values: dict[str, Any], path: str, text: str) -> None:
    if text.lstrip().startswith("{"):
        raise ConfigError(
            f"{_shown(path)}: give its fields one by one, e.g. {_shown(path)}.<field>=value"
        )
    value: Any = None if text in recipe_yaml.NOTHING[1:] else text
    if text and not _is_text(path):
        try:
            value = recipe_yaml.parsed(text, _is_text, path)
        except Unreadable as error:
            raise ConfigError(f"{_shown(path)}: {error.why} (got {_shown(repr(text))})") from None
    *parents, leaf = path.split(".")
    node = values
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            if path in _annotations():
                return  # the field is right; `checked` says that its section was given a value
            raise ConfigError(f"{_shown(path)}: no such field{_suggestion(path)}")
        node = child
    node[leaf] = value


def _misread(values: dict[str, Any]) -> list[str]:
    """Takes out values that pydantic would turn into something else, and says which.

    A text field that is null is not given: it has its default. Pydantic takes `true` for 1, and
    texts for numbers, with rules of its own: `1_000` is 1000.
    """
    problems = []
    for path, field in field_paths():
        section, _, name = path.rpartition(".")
        node = values.get(section, {}) if section else values
        if not isinstance(node, dict) or name not in node:
            continue
        kinds, words = _kinds(field.annotation)
        if node[name] is None and field.annotation is str:
            del node[name]
            continue
        wrong = [x for x in _leaves(node[name]) if _is_wrong(x, kinds, words)]
        if wrong:
            what = "number" if float in kinds else "integer"
            what = "string" if str in kinds else what
            choice = "".join(f", or {word!r}" for word in words)
            problems.append(
                f"{path}: Input should be a valid {what}{choice} (got {_shown(repr(wrong[0]))})"
            )
            del node[name]
    return problems


def _is_wrong(value: Any, kinds: set[Any], words: list[Any]) -> bool:
    if value is None:
        return kinds == {str}
    if isinstance(value, bool):
        return bool not in kinds and bool(kinds & {int, float})
    return isinstance(value, str) and bool(kinds & {int, float}) and value not in words


def _kinds(annotation: Any) -> tuple[set[Any], list[Any]]:
    """The scalar types of an annotation, and the words that it names."""
    if get_origin(annotation) is Literal:
        return set(), list(get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if not (arguments := [a for a in get_args(annotation) if a is not Ellipsis]):
        return {annotation}, []
    parts = [_kinds(argument) for argument in arguments]
    return {kind for kinds, _ in parts for kind in kinds}, [w for _, words in parts for w in words]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [x for one in value for x in _leaves(one)] if isinstance(value, list) else [value]


@cache
def _annotations() -> dict[str, Any]:
    return {name: field.annotation for name, field in field_paths()}


def _is_text(path: str) -> bool:
    """Whether a field holds text, or texts by name (`leaks.sets.<name>`)."""
    kinds = _annotations()
    section = path.rpartition(".")[0]
    return kinds.get(path) is str or kinds.get(section) == dict[str, str]


def _sections() -> set[str]:
    return {path.rpartition(".")[0] for path, _ in field_paths()}


def _shown(text: str, most: int = SHOWN) -> str:
    return shortened(public(text), most)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


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
    if path not in known:
        path = _shown(path)
    if error["type"] == "extra_forbidden":
        return path, f"no such field{_suggestion(path)}"
    if error["type"] in {"model_type", "model_attributes_type"}:
        return path, f"is a section, give its fields as {path}.<field>=value"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return path, message
    return path, f"{message} (got {_shown(repr(error['input']))})"


def _suggestion(path: str) -> str:
    known = [name for name, _ in field_paths()]
    sections = sorted({name.rpartition(".")[0] for name in known})
    near = difflib.get_close_matches(path, known + sections, n=1, cutoff=0.6)
    if not near:  # right name, wrong section
        leaf = path.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == leaf][:1]
    return f"; did you mean {near[0]}?" if near else ""
