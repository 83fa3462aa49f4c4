"""What of a folder is trained on, scored or left alone, and which folders are classes.

Classes are decided first: without them no held-out part can be scored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.adapt.recipe import is_set
from pipeline.config.config import Config
from pipeline.context import BUILTIN
from pipeline.errors import DataError, StorageError
from pipeline.images.kinds import claims_images
from pipeline.pack.listing import list_source
from pipeline.pack.source_places import absolute_source
from pipeline.stages.checks.known_sets import KnownSet, known_set
from pipeline.stages.checks.parts import HELD_OUT, TRAINING, parts_of
from pipeline.train.speed.bottleneck import count
from pipeline.uri import is_uri

FEW_OF_A_CLASS = 4  # images of a folder on average, below which folders are no classes
NUMBER = re.compile(r"\d{1,2}")
# Folders by date, and those that cameras make (DCIM/100CANON)
NO_CLASS = re.compile(r"(19|20)\d\d([-_. ]?\d\d){0,2}|\d{1,2}|\d{3}[A-Z_]{3,5}|DCIM", re.IGNORECASE)
UNSEEN = "neither trained on nor scored"


@dataclass(frozen=True)
class Split:
    """A place of images in its parts; as in `Folder`."""

    known: KnownSet
    source: str
    queries: str
    classes: tuple[str, ...]
    classes_why: str
    no_classes: str
    together: str
    beside: tuple[tuple[str, str], ...]


def split(config: Config) -> Split:
    """Decides what `data.source` is made of.

    Raises:
        PipelineError: nothing is there, or nothing that can be packed.
    """
    named = config.data.source
    source, queries = _parts(config)
    data = config.data.model_copy(update={"source": source})
    config = config.model_copy(update={"data": data})
    known = known_set(config, "data.source", source)
    chosen = bool(queries) and not config.evaluate.queries  # by us: it may be left alone
    held_out = _held_out(config, queries) if chosen else None
    classes, why, no_classes = _classes(config, known, queries, held_out)
    beside = []
    if chosen and (unscored := _unscored(known, classes, held_out, source)):
        images = held_out.images if held_out else 0
        number = f"{count(images, 'image')}, " if images else ""
        text = f"{number}{UNSEEN}: {unscored}"
        if images:
            text += f"; to train on all, set data.source={named} data.labels=none in the recipe"
        beside.append((queries, text))
    if source != named:
        seen = {Path(place).name for place in (source, queries) if place}
        beside += _beside(Path(named), seen, config.data.follow_links)
    if beside and beside[0][0] == queries:
        queries = ""
    together = "" if source != named or config.evaluate.queries else _together(config, known)
    return Split(known, source, queries, classes, why, no_classes, together, tuple(beside))


def _parts(config: Config) -> tuple[str, str]:
    """Training images and held-out ones, where a folder has `train/` and `val/` or `test/`.

    A `train/` among other folders is no part of a set but a class: pictures of trains.
    """
    source, queries = config.data.source, config.evaluate.queries
    if source.startswith(BUILTIN) or is_uri(source) or not Path(source).is_dir():
        return source, queries
    names = {path.name.lower(): path.name for path in Path(source).iterdir() if path.is_dir()}
    training = next((names[name] for name in TRAINING if name in names), "")
    home = source.rstrip("/")
    if queries:  # a folder beside `train/` is its held-out set, whatever its name
        local = not queries.startswith(BUILTIN) and not is_uri(queries)
        place = Path(queries).resolve()
        is_beside = local and place.parent == Path(source).resolve() and place.name != training
        return (f"{home}/{training}" if training and is_beside else source), queries
    held_out = next((names[name] for name in HELD_OUT if name in names), "")
    others = [name for name in names.values() if name != training and not name.startswith(".")]
    if not training or (others and not held_out):
        return source, ""
    return f"{home}/{training}", f"{home}/{held_out}" if held_out else ""


def _together(config: Config, known: KnownSet) -> str:
    """Which parts of a set are trained on together: those of a list, a pattern or a URI, where none
    is held out. "" where there are none.
    """
    source = config.data.source
    if source.startswith(BUILTIN) or known.shards is not None:
        return ""
    listing = list_source(absolute_source(source), follow_links=config.data.follow_links)
    names = {entry.path.partition("/")[0] for entry in listing.entries if "/" in entry.path}
    training, others = parts_of(names)
    if not training or not others:
        return ""
    return (
        f"none: {', '.join([*training, *others])} are all trained on; to hold one out, set "
        f"data.source=…/{training[0]} evaluate.queries=…/{others[0]}"
    )


def _held_out(config: Config, queries: str) -> KnownSet | None:
    """What is held out; None where there is nothing that could be packed."""
    try:
        return known_set(config, "evaluate.queries", queries)
    except StorageError:
        raise
    except DataError:
        return None


def _classes(
    config: Config, known: KnownSet, queries: str, held_out: KnownSet | None
) -> tuple[tuple[str, ...], str, str]:
    """(the names, why they are classes all the same, or why folders that are there are none)."""
    names = known.labels.names if known.labels.kind == "names" else ()
    if config.data.labels == "none":
        return (), "", "data.labels=none, as you set it"
    if not names or is_set(config, "data.labels"):
        return names, "", ""
    doubt = ""
    if known.images and known.images < FEW_OF_A_CLASS * len(names):
        each = known.images / len(names)
        doubt = f"{len(names):,} folders with {each:.1f} images each are no classes"
    elif all(NO_CLASS.fullmatch(name) for name in names):
        doubt = f"folders such as {names[0]} are dates, numbers or a camera's, no classes"
    elif all(name.lower() in TRAINING + HELD_OUT for name in names):
        doubt = f"folders such as {names[0]} are parts of a set, no classes"
    if not doubt:
        return names, "", ""
    if config.evaluate.queries and not config.evaluate.reference:
        return names, "evaluate.queries are told by them", ""
    dated = all(NO_CLASS.fullmatch(name) and not NUMBER.fullmatch(name) for name in names)
    if held_out is not None and set(held_out.labels.names) == set(names) and not dated:
        return names, f"{queries} has the same folders", ""
    return (), "", doubt


def _unscored(
    known: KnownSet, classes: tuple[str, ...], held_out: KnownSet | None, source: str
) -> str:
    """Why the held-out part cannot be scored; "" where it can."""
    if held_out is None:
        return "it holds no images"
    kinds = {known.labels.kind, held_out.labels.kind}
    if known.labels.kind == "none" or (known.labels.kind == "names" and not classes):
        return f"{source} has no classes to tell its images by"
    if held_out.labels.kind == "none":
        return "it has no classes"
    if kinds == {"names", "numbers"}:
        return f"one of it and {source} has classes by name, the other by number"
    if kinds == {"names"} and not set(classes) & set(held_out.labels.names):
        return f"none of its classes is in {source}"
    return ""


def _beside(home: Path, seen: set[str], follow_links: bool) -> Iterator[tuple[str, str]]:
    """What lies beside the parts that are used, as (place, text)."""
    loose = 0
    for path in sorted(home.iterdir()):
        if path.name in seen or path.name.startswith("."):
            continue
        if not path.is_dir():
            loose += claims_images(path.name)
            continue
        try:
            listing = list_source(absolute_source(str(path)), follow_links=follow_links)
        except StorageError:
            raise
        except DataError:
            continue  # nothing is in it
        if files := sum(claims_images(entry.path) for entry in listing.entries):
            yield str(path), f"{count(files, 'file')}, {UNSEEN}"
    if loose:
        yield str(home), f"{count(loose, 'file')} beside its folders, {UNSEEN}"
