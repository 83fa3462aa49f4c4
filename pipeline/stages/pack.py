"""The pack stage: sources of images into image shards, for training and for evaluation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.config import Config
from pipeline.context import (
    BUILTIN,
    Context,
    evaluation_sources,
    is_shards,
    labels_of,
    packed_set,
    packed_uri,
    result_line,
)
from pipeline.embed.vectors import is_vectors
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.heartbeat import now
from pipeline.images.value_range import sentence
from pipeline.pack import ledger, source_places
from pipeline.pack.listing import Listing, list_source
from pipeline.pack.pack import PackOptions, PackPlaces, PackReport, pack
from pipeline.pack.source_places import absolute_source
from pipeline.shards.shards import open_shards
from pipeline.stages.checks.known_sets import builtin_part
from pipeline.storage.claim import Owner, check_unclaimed
from pipeline.storage.mirror import upload_folder
from pipeline.storage.places import absolute_uri
from pipeline.storage.run_folder import RunFolder, fingerprint
from pipeline.storage.transfer import local_copy
from pipeline.uri import Place, is_uri, join, parent, public

UNREADABLE = 0.9  # of an evaluation set: with more of it bad, what is scored is not that set
SETTINGS = (
    "image_column",
    "label_column",
    "labels",
    "label_member",
    "follow_links",
    "max_bad_fraction",
    "max_image_pixels",
    "max_image_mb",
    "shard_mb",
    "row_group_images",
    "range",
)


FIELDS = {  # of the recipe that name the sources
    "train": "data.source",
    "reference": "evaluate.reference",
    "queries": "evaluate.queries",
    "keep": "guard.keep",
}


def named_sources(config: Config, folder: RunFolder) -> dict[str, tuple[str, str]]:
    """What is packed: name -> (source, shards). Evaluation sets that are shards, or vectors, stay
    so.
    """
    places = {}
    if config.data.source:
        places["train"] = (config.data.source, packed_uri(config, folder))
    for name, source in evaluation_sources(config).items():
        if not is_shards(source) and not is_vectors(source):
            places[name] = (source, str(packed_set(name, source, folder)))
    return places


def _stem(name: str, shards: str) -> str:
    """What the files beside the shards of a set are called by."""
    return name if name == "train" else parent(shards)[1]


def unread_of(folder: RunFolder, shards: str) -> str:
    """A sentence on the files of an evaluation set that are not among its shards, or ""."""
    home, stem = parent(shards)
    if str(home) != str(folder.at("pack")):
        return ""  # others packed it
    known = ledger.report_of(str(folder.at("pack", f"work_{stem}")))
    bad, copies = known.get("bad", {}), known.get("duplicates", 0)
    said = []
    if bad:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(bad.items()))
        said.append(
            f"{sum(bad.values()):,} of {known['images_in']:,} could not be read ({reasons}), "
            f"listed in {public(folder.at('pack', f'bad_images_{stem}.parquet'))}"
        )
    if copies:
        said.append(f"{copies:,} are byte for byte like another one, and are left out")
    return "; ".join(said)


def check_places(config: Config, folder: RunFolder) -> None:
    """Refuses outputs that lie inside of what is packed, or hold what others packed.

    Raises:
        DataError: one does.
    """
    for name, (source, shards) in named_sources(config, folder).items():
        if not source.startswith(BUILTIN):
            named = name == "train" and config.data.shards
            fields = {"data.shards": shards} if named else {}
            places = fields | {"run.folder": str(folder.at("pack"))}
            source = absolute_source(source)
            source_places.check_places(source, places, FIELDS[name])
            shards = absolute_uri(shards)
            work_place = absolute_uri(str(folder.at("pack", f"work_{_stem(name, shards)}")))
            _check_source(shards, public(source), own=not fields)
            mine = check_unclaimed(shards, Owner(public(source), public(work_place)))
            mine |= ledger.begun(work_place)
            ledger.check_replaceable(shards, public(source), own=mine)


def _check_source(shards: str, source: str, own: bool) -> None:
    """Refuses shards of another source; in a run's own folder a run of another name is the way."""
    try:
        ledger.check_source(shards, source)
    except StorageError:
        raise
    except DataError as error:
        hint = "take another run.name=… for other images, or delete that folder first"
        raise DataError(error.what, hint if own else error.hint) from error


def sources(context: Context) -> dict[str, tuple[str, str]]:
    """As `named_sources`, with a folder of tiles, made once, in place of `builtin:photos`."""
    named = named_sources(context.config, context.folder)
    return {name: (_unfold(source, context), to) for name, (source, to) in named.items()}


def key(context: Context) -> str:
    """Changes when a setting or a file of a source does."""
    data = context.config.data.model_dump(include=set(SETTINGS))
    if not sources(context):
        raise ConfigError(
            "nothing to pack: data.source is empty", "name the images: data.source=photos/"
        )
    listed = {
        name: [ledger.key_of(_listing(context, name, source), [source]), shards]
        for name, (source, shards) in sources(context).items()
    }
    channels = context.config.model.in_channels  # what each image must be able to give
    return fingerprint([data, listed] + [channels] * (channels != 3))


def finished(config: Config, folder: RunFolder) -> bool:
    """Whether the stage was finished with these settings and sources. Nothing is made for it."""
    named = [source for source, _ in named_sources(config, folder).values()]
    if not named or not folder.last("pack") or any(one.startswith(BUILTIN) for one in named):
        return False
    return folder.done("pack", key(Context(config, folder))) is not None


def _listing(context: Context, name: str, source: str) -> Listing:
    follow = context.config.data.follow_links
    return list_source(absolute_source(source), follow_links=follow, field=FIELDS[name])


def intact(context: Context) -> bool:
    """Whether the shards of a finished stage are still there."""
    try:
        for _, shards in sources(context).values():
            open_shards(shards)
    except StorageError:
        raise
    except DataError:
        return False
    return True


def _options(config: Config, field: str) -> PackOptions:
    """How the source that this field names is packed.

    What cannot be read of an evaluation set is counted, and said on the card: it ends no run.
    """
    data = config.data
    limit = data.max_bad_fraction
    limit = limit if field == FIELDS["train"] else max(limit, UNREADABLE)
    return PackOptions(
        image_column=data.image_column,
        label_column=data.label_column,
        labels=labels_of(config, field),
        max_bad_fraction=limit,
        max_pixels=data.max_image_pixels,
        max_image_bytes=int(data.max_image_mb * 2**20),
        channels=config.model.in_channels,
        value_range=data.range,
        shard_bytes=int(data.shard_mb * 2**20),
        row_group_images=data.row_group_images,
        label_member=data.label_member,
        follow_links=data.follow_links,
    )


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Packs all sources; the numbers of the training set are the stage's metrics."""
    summary: dict[str, Any] = {}
    for name, (source, shards) in sources(context).items():
        now(f"pack: {name}, listing the source")
        stem = _stem(name, shards)
        report = pack(
            source,
            shards,
            PackPlaces(
                bad_images=str(context.folder.at("pack", f"bad_images_{stem}.parquet")),
                scratch=str(context.folder.at("pack", f"work_{stem}")),
                other_files=str(context.folder.at("pack", f"other_files_{stem}.parquet")),
                duplicates=str(context.folder.at("pack", f"duplicates_{stem}.parquet")),
            ),
            _options(context.config, FIELDS[name]),
            field=FIELDS[name],
            on_progress=partial(_progress, name),
        )
        text = _text(name, report, context.folder.at("pack"))
        result_line("pack", text)
        if said := sentence(report.used_range, report.value_range):
            result_line("range", f"{name} set: {said}")
            tracker.note(f"{name} set: {said}")
        _track(context, tracker, name, report, source, shards)
        summary[name] = _numbers(report)
        summary["text"] = "; ".join(filter(None, [summary.get("text"), text]))
    return summary


def _progress(name: str, what: str, done: int, total: int) -> None:
    now(f"pack: {name}, {what} {done} of {total} tasks")


def _unfold(source: str, context: Context) -> str:
    """`builtin:photos/train` becomes a folder of tiles, made once."""
    if not source.startswith(BUILTIN):
        return source
    part = builtin_part(source)
    from pipeline.pack.demo.tiles import DEMO_MARK, make_demo

    local = Path(make_demo(context.folder.path / "source").folder)
    place = context.folder.at("source")
    if is_uri(place):  # where all nodes can read it
        upload_folder(local, str(place), DEMO_MARK)
    return str(join(place, part))


def _numbers(report: PackReport) -> dict[str, Any]:
    return {
        "images_in": report.images_in,
        "images": report.images_packed,
        "duplicates": report.duplicates,
        "disagreeing": report.disagreeing,
        "bad_images": sum(report.bad.values()),
        "bytes": report.bytes,
        "storage_retries": report.retries,
        "shards": report.shards,
        "digest": report.digest,
        "classes": len(report.class_names),
        "bad": dict(report.bad),
        "other_files": sum(report.others.values()),
        "others": dict(report.others),
    }


def _text(name: str, report: PackReport, lists: Place) -> str:
    """What became of the files of a set, and the folder of the lists of those that are no rows."""
    bad = ", ".join(f"{count} {reason}" for reason, count in sorted(report.bad.items()))
    count = sum(report.others.values())
    others = ""
    if count:
        kinds = ", ".join(f"{n} {reason}" for reason, n in sorted(report.others.items()))
        others = f"; {count} other file{'s' * (count != 1)} left alone ({kinds})"
    other_class = f" ({report.disagreeing:,} in another class)" if report.disagreeing else ""
    listed = count or report.duplicates or report.bad
    return (
        f"{name}: {report.images_in:,} in = {report.images_packed:,} packed + "
        f"{report.duplicates:,} byte duplicates{other_class} + {sum(report.bad.values()):,} bad"
        f"{f' ({bad})' if bad else ''}, {report.seconds:.0f} s{others}"
        f"{f'; listed in {public(lists)}' if listed else ''}"
    )


def _track(
    context: Context, tracker: Any, name: str, report: PackReport, source: str, shards: str
) -> None:
    numbers = _numbers(report)
    prefix = "data" if name == "train" else f"data/{name}"
    tracker.metrics(0, {f"{prefix}/{k}": numbers[k] for k in ("images_in", "images", "duplicates")})
    tracker.metrics(0, {f"{prefix}/bad_images": numbers["bad_images"]})
    tracker.metrics(0, {f"{prefix}/storage_retries": report.retries})
    tracker.dataset(name, report.digest, public(source), "packing", report.images_in)
    if numbers["bad_images"]:
        import pyarrow.parquet as pq

        stem = _stem(name, shards)
        with local_copy(context.folder.at("pack", f"bad_images_{stem}.parquet")) as table:
            tracker.table(f"bad_images_{name}", pq.read_table(table).slice(0, 500).to_pydict())
    if name == "train":
        if context.only:  # else the pipeline's page begins with what the training came to
            tracker.headline(0, {"data/images": numbers["images"]})
        tracker.tags({"images.manifest": report.digest, "shards": public(shards)})
        tracker.note(
            f"{report.images_packed:,} images packed of {report.images_in:,}: "
            f"{report.duplicates:,} byte duplicates ({report.disagreeing:,} in another class), "
            f"{numbers['bad_images']:,} bad"
        )
