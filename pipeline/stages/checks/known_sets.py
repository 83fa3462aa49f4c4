"""What can be known of an image set before it is packed: images, bytes, labels."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from pipeline.config.config import Config
from pipeline.context import BUILTIN, labels_of
from pipeline.embed.vectors import MARK
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.evaluate.labels import Kind, Labels
from pipeline.images.kinds import named_as_image
from pipeline.pack.listing import Listing, list_source
from pipeline.pack.source_places import absolute_source, inside
from pipeline.pack.sources import Plan, Reading, plan_tasks
from pipeline.shards.columns import MANIFEST, image_id
from pipeline.shards.shards import ShardSet, open_shards
from pipeline.storage.places import exists, resolve_uri
from pipeline.uri import join, public

log = logging.getLogger("pipeline.evaluate")

BUILTIN_PARTS = ("train", "test")
OF_A_RUN = {"vectors": f"vectors/{MARK}", "shards": f"shards/{MANIFEST}"}
A_RUN = ("config.yaml", "evaluate/_done.json")
READ_BYTES = 2 * 2**30  # of files that a dry run reads to compare two sets: some seconds


@dataclass(frozen=True)
class KnownSet:
    """A set that a recipe names, packed or not.

    Attributes:
        labels: and the name of the set.
        images: files and rows, copies and bad ones included; 0 where archives hide them.
        size: bytes, as they are stored.
        shards: the set itself, where it is packed or can be read as it is.
        files: the local image files that it is made of, and their bytes; None where some of it is
            elsewhere, in archives or in tables.
    """

    labels: Labels
    images: int
    size: int
    shards: ShardSet | None = None
    files: tuple[tuple[str, int], ...] | None = None

    @classmethod
    def of(cls, field: str, shards: ShardSet) -> KnownSet:
        """A set that is packed, or can be read as it is."""
        size = sum(file.bytes for file in shards.files)
        return cls(Labels.of(field, shards), shards.rows, size, shards)


def known_set(config: Config, field: str, uri: str, packed: bool = False) -> KnownSet:
    """What a place holds, by its manifest, its footers or its list of files; no image is opened.

    Where it is `packed` already, what the pack has found to fit is not looked at again.

    Raises:
        PipelineError: it cannot be packed: nothing is there, or columns that are of no use.
    """
    if uri.startswith(BUILTIN):
        return _builtin(field, uri)
    try:
        data, labels = config.data, labels_of(config, field)
        shards = open_shards(uri, data.image_column, data.label_column, field, labels != "none")
    except StorageError:
        raise
    except DataError:
        return _source(config, field, uri, packed)
    known = KnownSet.of(field, shards)
    if labels == "none":  # pack leaves them out
        return replace(known, labels=replace(known.labels, kind="none", names=()))
    return known


def of_runs(config: Config) -> Config:
    """Sets that are named as the folder of a run, as what is meant: its vectors, or where models
    are named its packed images.

    Raises:
        ConfigError: a run has neither.
    """
    settings, changed = config.evaluate, {}
    for name in ("reference", "queries"):
        uri = getattr(settings, name)
        if not uri or uri.startswith(BUILTIN):
            continue
        there = [what for what, mark in OF_A_RUN.items() if exists(*resolve_uri(f"{uri}/{mark}"))]
        if not there and all(exists(*resolve_uri(f"{uri}/{mark}")) for mark in A_RUN):
            raise ConfigError(
                f"evaluate.{name}={public(uri)} is the folder of a run that has no shards/ and no "
                "vectors/ of its own",
                "name the images themselves, as that run had them: data=photos/",
            )
        if "vectors" in there and settings.models and "shards" in there:
            there.remove("vectors")
        if there and not exists(*resolve_uri(f"{uri}/{MARK}")):
            changed[name] = str(join(uri, there[0]))
            said = "its vectors" if there[0] == "vectors" else "its packed images"
            log.info("evaluate    evaluate.%s=%s is a run: %s are meant", name, public(uri), said)
    return config.model_copy(update={"evaluate": settings.model_copy(update=changed)})


def also_in(reference: KnownSet, queries: KnownSet) -> int | None:
    """How many files of the queries are in the reference too, byte for byte.

    None where that shows only once both are packed, or would take long. Only files of a size that
    is in both sets are read.
    """
    if reference.files is None or queries.files is None:
        return None
    sizes = {size for _, size in reference.files} & {size for _, size in queries.files}
    asked, votes = (
        [(path, size) for path, size in known.files or () if size in sizes]
        for known in (queries, reference)
    )
    if sum(size for _, size in {*asked, *votes}) > READ_BYTES:
        return None
    there = {_hash(path) for path, _ in votes} - {""}
    return sum(_hash(path) in there for path, _ in asked)


def _hash(path: str) -> str:
    """The id of an image file; "" where it cannot be read, which the pack will say."""
    try:
        return image_id(Path(path).read_bytes())
    except OSError:
        return ""


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
    from pipeline.pack.demo.tiles import DEMO_BYTES, DEMO_IMAGES

    builtin_part(uri)
    return KnownSet(Labels(f"{field}={uri}", "names"), DEMO_IMAGES, DEMO_BYTES)


def _source(config: Config, field: str, uri: str, packed: bool) -> KnownSet:
    data, source = config.data, absolute_source(uri)
    listing = list_source(source, follow_links=data.follow_links, field=field)
    limit = int(data.max_image_mb * 2**20)
    labels = labels_of(config, field)
    member = data.label_member if labels == "auto" else ""
    reading = Reading(data.image_column, data.label_column, limit, labels != "none", member)
    plan = plan_tasks(source, listing, reading, fit=not packed)
    kind, names = _labels(labels, plan, listing)
    return KnownSet(
        Labels(f"{field}={public(source)}", kind, names),
        plan.images,
        sum(entry.size for entry in listing.entries),
        files=_files(plan, listing),
    )


def _files(plan: Plan, listing: Listing) -> tuple[tuple[str, int], ...] | None:
    fs, _ = resolve_uri(listing.uri)
    if fs.type_name != "local" or any(task.kind != "files" for task in plan.tasks):
        return None
    images = [entry for entry in listing.entries if named_as_image(entry.path)]
    return tuple((inside(listing.root, entry.path), entry.size) for entry in images)


def _labels(labels: str, plan: Plan, listing: Listing) -> tuple[Kind, tuple[str, ...]]:
    """As `pack` will find them: folders are classes where there are two or more of them."""
    if labels == "none":
        return "none", ()
    paths = [entry.path for entry in listing.entries if named_as_image(entry.path)]
    folders = {PurePosixPath(path).parent.name for path in paths} - {""}
    if len(folders) == 1 and labels != "folder":
        folders = set()
    names = folders | {name for names in plan.name_lists for name in names}
    if names and not plan.labelled:
        return "names", tuple(sorted(names))
    hidden = plan.labelled or any(task.kind in ("archive", "parquet") for task in plan.tasks)
    return ("unknown" if hidden else "none"), ()
