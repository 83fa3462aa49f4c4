"""What can be known of an image set before it is packed: images, bytes, labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from pipeline.config import Config
from pipeline.data.kinds import named_as_image
from pipeline.data.listing import Listing, absolute_source, list_source
from pipeline.data.schema import ShardSet, open_shards
from pipeline.data.sources import Plan, plan_tasks
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.evaluate.labels import Kind, Labels
from pipeline.stages.context import BUILTIN
from pipeline.uri import public

BUILTIN_PARTS = ("train", "test")


@dataclass(frozen=True)
class KnownSet:
    """A set that a recipe names, packed or not.

    Attributes:
        labels: and the name of the set.
        images: files and rows, copies and bad ones included; 0 where archives hide them.
        size: bytes, as they are stored.
        shards: the set itself, where it is packed or can be read as it is.
    """

    labels: Labels
    images: int
    size: int
    shards: ShardSet | None = None

    @classmethod
    def of(cls, field: str, shards: ShardSet) -> KnownSet:
        """A set that is packed, or can be read as it is."""
        size = sum(file.bytes for file in shards.files)
        return cls(Labels.of(field, shards), shards.rows, size, shards)


def known_set(config: Config, field: str, uri: str) -> KnownSet:
    """What a place holds, by its manifest, its footers or its list of files; no image is opened.

    Raises:
        PipelineError: it cannot be packed: nothing is there, or columns that are of no use.
    """
    if uri.startswith(BUILTIN):
        return _builtin(field, uri)
    try:
        data = config.data
        found = open_shards(uri, data.image_column, data.label_column, field, data.labels != "none")
    except StorageError:
        raise
    except DataError:
        return _source(config, field, uri)
    known = KnownSet.of(field, found)
    if field == "data.source" and config.data.labels == "none":  # pack leaves them out
        return replace(known, labels=replace(known.labels, kind="none", names=()))
    return known


def builtin_part(source: str) -> str:
    """`train` or `test` of `builtin:photos/test`.

    Raises:
        ConfigError: it has another end.
    """
    part = source.removeprefix(BUILTIN).strip("/") or BUILTIN_PARTS[0]
    if part not in BUILTIN_PARTS:
        raise ConfigError(f"no source {source}", f"there are {BUILTIN}/train and {BUILTIN}/test")
    return part


def _builtin(field: str, uri: str) -> KnownSet:
    from pipeline.data.demo import DEMO_BYTES, DEMO_IMAGES

    builtin_part(uri)
    return KnownSet(Labels(f"{field}={uri}", "names"), DEMO_IMAGES, DEMO_BYTES)


def _source(config: Config, field: str, uri: str) -> KnownSet:
    data, source = config.data, absolute_source(uri)
    listing = list_source(source, follow_links=data.follow_links, field=field)
    limit = int(data.max_image_mb * 2**20)
    member = data.label_member if data.labels == "auto" else ""
    plan = plan_tasks(
        source,
        listing,
        data.image_column,
        data.label_column,
        limit,
        member,
        labels=data.labels != "none",
    )
    kind, names = _labels(config, plan, listing)
    return KnownSet(
        Labels(f"{field}={public(source)}", kind, names),
        plan.images,
        sum(entry.size for entry in listing.entries),
    )


def _labels(config: Config, plan: Plan, listing: Listing) -> tuple[Kind, tuple[str, ...]]:
    """As `pack` will find them: folders are classes where there are two or more of them."""
    if config.data.labels == "none":
        return "none", ()
    paths = [entry.path for entry in listing.entries if named_as_image(entry.path)]
    folders = {PurePosixPath(path).parent.name for path in paths} - {""}
    if len(folders) == 1 and config.data.labels != "folder":
        folders = set()
    names = folders | {name for names in plan.name_lists for name in names}
    if names and not plan.labelled:
        return "names", tuple(sorted(names))
    hidden = plan.labelled or any(task.kind in ("archive", "parquet") for task in plan.tasks)
    return ("unknown" if hidden else "none"), ()
