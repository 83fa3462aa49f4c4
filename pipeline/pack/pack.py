"""Packs any pile of images into shards ordered by image id, by two passes of Ray Data tasks.

First every task reads part of the source, verifies each image by decoding it, and writes runs
sorted by id (`runs.py`). Then every task takes a range of ids from all runs and writes one shard
(`merge.py`). The shards depend on the source and the arguments, not on the tasks or the machine.

All results are written atomically, each with an account beside it, so a pack that was killed goes
on with what is missing when it is started again.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.errors import DataError, StorageError
from pipeline.images.bad_image import INSTALL
from pipeline.images.decode import MAX_PIXELS
from pipeline.images.value_range import AUTO, FULL, Sample, ValueRange
from pipeline.pack import ledger
from pipeline.pack.items import Reading
from pipeline.pack.ledger import PackReport
from pipeline.pack.listing import Other, Refused, absolute_source, list_source
from pipeline.pack.merge import Merge, write_shard
from pipeline.pack.sorted_runs import INDEX_VERSION, PackSpec, write_runs
from pipeline.pack.sources import Plan, Task, plan_tasks
from pipeline.shards.classes import Classes
from pipeline.storage.claim import Owner, claimed
from pipeline.storage.places import absolute_uri, public_uri, resolve_uri
from pipeline.storage.transfer import write_bytes_atomic
from pipeline.uri import join, parent

__all__ = ["MAX_IMAGE_BYTES", "PackReport", "pack"]
log = logging.getLogger("pipeline.pack")

RGB = 3  # channels
RUN_BYTES = 128 * 2**20  # of images in memory of one task before they are written
MAX_IMAGE_BYTES = 64 * 2**20
Progress = Callable[[str, int, int], None]


@contextmanager
def _storage_errors() -> Iterator[None]:
    """What storage says, as a sentence; bad files of the source never come to this."""
    try:
        yield
    except StorageError as error:
        more = "the same pack goes on where it stopped" if error.passing else ""
        raise DataError(error.what, hint="; ".join(filter(None, [error.hint, more]))) from error
    except OSError as error:
        raise DataError(
            f"packing stopped: {type(error).__name__}: {error}",
            hint="mend what it names (space, rights, mount) and run the same pack again: it "
            "goes on where it stopped.",
        ) from error


@_storage_errors()
def pack(
    source: str,
    shards: str,
    *,
    image_column: str = "image",
    label_column: str = "label",
    labels: Literal["auto", "folder", "none"] = "auto",
    max_bad_fraction: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    channels: int = 3,
    value_range: ValueRange | Literal["auto-from-sample"] = AUTO,
    shard_bytes: int = 256 * 2**20,
    row_group_images: int = 256,
    bad_images: str,
    work: str,
    other_files: str = "",
    label_member: str = "cls",
    follow_links: bool = False,
    field: str = "data.source",
    on_progress: Progress | None = None,
) -> PackReport:
    """Pack the images under `source` into the folder `shards`. Needs a Ray cluster that is joined.

    Args:
        source: folder of any depth, archive, parquet, a pattern such as `folder/**/*.jpg`, or
            several of them with commas between; paths or pyarrow URIs.
        shards: folder for the shards and their manifest. An older pack of the same source there is
            replaced.
        image_column: column of the images in parquet sources.
        label_column: column of class ids or class names in parquet sources.
        labels: "folder": the parent folder of an image is its class; "auto": only where there are
            two or more such folders; "none": no labels at all, label columns are not looked at.
            Label columns of parquet sources are kept by "auto" and "folder".
        max_bad_fraction: more bad images than this part of all end the pack.
        max_pixels: images with more pixels are bad (too_large).
        max_image_bytes: encoded images with more bytes are bad (too_large).
        channels: that training will ask for (see `decode.decode_image`); an image that cannot give
            them is bad (undecodable).
        value_range: of images of more than 8 bits, that becomes 0 to 255; noted in the shards.
        shard_bytes: about the size of a shard.
        row_group_images: rows of a row group, fewer where images are large.
        bad_images: path of the bad image table (parquet), written before anything can fail on it.
        work: folder for intermediate files, as large as the images; emptied at the end.
        other_files: path of the table (parquet) of files that are no images and were left alone;
            default: `other_files.parquet` beside `bad_images`.
        label_member: ending of the files beside images that hold their labels (`labels`); "" for
            none. Not looked at where labels is "folder" or "none".
        follow_links: read what links to files lead to, wherever that is.
        field: of the config, for sentences about the source.
        on_progress: called with ("read" or "write", tasks done, tasks in all).

    Raises:
        DataError: nothing to pack, too many bad images, columns or labels that cannot be used, an
            output folder that holds something else, no space.
    """
    begin = time.monotonic()
    shards, work, bad_images = (absolute_uri(str(uri)) for uri in (shards, work, bad_images))
    source = absolute_source(str(source))
    other_files = other_files or str(join(parent(bad_images)[0], "other_files.parquet"))
    listing = list_source(source, follow_links=follow_links, field=field)
    outputs = {"shards": shards, "work": work, "bad_images": bad_images}
    ledger.check_places(source, outputs, field)
    label_member = label_member if labels == "auto" else ""
    # All that the shards depend on. The limit of bad images is not in it: with a higher one, a pack
    # that ended on it goes on.
    arguments = [source, shards, image_column, label_column, labels, max_pixels, max_image_bytes]
    arguments += [shard_bytes, row_group_images]
    # Only where it is not RGB, so that packs made before there was a choice stay finished.
    arguments += [f"channels={channels}"] if channels != RGB else []
    named = labels == "auto" and label_member != "cls"
    arguments += [f"label_member={label_member}"] if named else []
    arguments += ["follow_links"] if follow_links else []
    arguments += [f"range={value_range}"] if value_range != AUTO else []
    key = ledger.key_of(listing, arguments)
    if (finished := ledger.finished(work, key, shards)) is not None:
        log.info("%s is packed already, nothing to do", shards)
        return finished
    looked_at = labels != "none"
    columns = (image_column, label_column)
    plan = plan_tasks(source, listing, *columns, max_image_bytes, label_member, looked_at)
    spec = PackSpec(
        source=listing.uri,
        root=listing.root,
        shards=shards,
        work=work,
        reading=Reading(*columns, max_image_bytes, plan.extras, looked_at, label_member),
        max_pixels=max_pixels,
        row_group_images=row_group_images,
        run_bytes=RUN_BYTES,
        name_lists=plan.name_lists,
        channels=channels,
        labelled=plan.labelled,
        value_range=value_range,
    )
    owner = Owner(public_uri(source), public_uri(work))
    with claimed(shards, owner, lambda: ledger.unfinished(shards)) as held:
        stale = ledger.start(work, key, INDEX_VERSION, source, held)
        sample = Sample()
        read = _read_all(plan.tasks, spec, sample, on_progress)
        bad = [*plan.refused, *(Refused(*row) for account in read for row in account["bad"])]
        images_in = len(plan.refused) + sum(account["images"] for account in read)
        others = listed_once(
            [*plan.others, *(Other(*row) for account in read for row in account["others"])]
        )
        ledger.write_bad_images(bad, bad_images)
        ledger.write_other_files(others, other_files)
        _warn(others)
        outcome = _Outcome(public_uri(source), bad, others, listing.links, bad_images, other_files)
        outcome.check(images_in, max_bad_fraction)
        used = sample.range
        chosen = (used or FULL) if value_range == AUTO else value_range
        merge = replace(_merge(plan, read, labels, shard_bytes, source), value_range=chosen)
        held.check()
        written = _write_all(merge, read, spec, on_progress)
        held.check()
        ledger.drop(held, stale, written)
        digest = ledger.write_manifest(shards, source, merge.class_names, written, chosen, used)
        report = PackReport(
            images_in=images_in,
            images_packed=sum(account["rows"] for account in written),
            duplicates=sum(account["duplicates"] for account in [*read, *written]),
            bad=dict(sorted(Counter(item.reason for item in bad).items())),
            bytes=sum(account["bytes"] for account in written),
            shards=sum(account["rows"] > 0 for account in written),
            digest=digest,
            class_names=merge.class_names,
            seconds=round(time.monotonic() - begin, 3),
            retries=sum(account.get("retries", 0) for account in [*read, *written]),
            others=dict(sorted(Counter(item.reason for item in others).items())),
            value_range=chosen,
            used_range=used,
        )
        if images_in != report.images_packed + report.duplicates + len(bad):
            raise RuntimeError(f"images were lost or counted twice: {report}")
        ledger.finish(work, key, shards, report)
        return report


def _read_all(
    tasks: Sequence[Task], spec: PackSpec, sample: Sample, on_progress: Progress | None
) -> list[dict[str, Any]]:
    done = ledger.accounts(spec.work, "runs", sample.take)
    work = [(i, task) for i, task in enumerate(tasks) if i not in done]

    def read(item: tuple[int, Task]) -> dict[str, Any]:
        return write_runs(*item, spec)

    return _all("read", read, work, done, on_progress, sample.take)


def _write_all(
    merge: Merge, read: Sequence[dict[str, Any]], spec: PackSpec, on_progress: Progress | None
) -> list[dict[str, Any]]:
    fs, folder = resolve_uri(spec.work)
    runs = [run for account in read for run in account["runs"]]
    write_bytes_atomic(json.dumps(runs).encode(), fs, f"{folder}/runs.json")
    done = ledger.written(spec)
    work = [i for i in range(merge.shards) if i not in done]

    def write(index: int) -> dict[str, Any]:
        return write_shard(index, merge, spec)

    return _all("write", write, work, done, on_progress)


def _all(
    what: str,
    function: Callable[[Any], dict[str, Any]],
    items: Sequence[Any],
    done: dict[int, dict[str, Any]],
    on_progress: Progress | None,
    see: Callable[[dict[str, Any]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """The accounts of all items in order, those of `done` and the rest by running `function`;
    `see` is called with each new one and may take out what is large.
    """
    total = len(done) + len(items)
    if done:
        log.info("%s: %d of %d tasks were finished before", what, len(done), total)
    for account in _each(function, items):
        see(account)
        done[account["index"]] = account
        if on_progress is not None:
            on_progress(what, len(done), total)
    return [done[index] for index in sorted(done)]


def _each(
    function: Callable[[Any], dict[str, Any]], items: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """Run `function` on each item as one Ray Data task; results as they come.

    Raises:
        OSError: the storage of intermediate files or shards failed.
    """
    if not items:
        return
    import ray

    shared = ray.put(list(items))

    def run(row: dict[str, Any]) -> dict[str, str]:
        try:
            return {"account": json.dumps(function(ray.get(shared)[row["item"]])), "error": ""}
        except StorageError as error:
            said = json.dumps([error.what, error.hint, error.passing])
            return {"account": said, "error": "storage"}
        except OSError as error:  # its words, not a traceback through Ray
            return {"account": "", "error": str(error)}

    dataset = ray.data.from_items(
        [{"item": i} for i in range(len(items))], override_num_blocks=len(items)
    ).map(run)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    with _quiet_ray_data():
        for row in dataset.iter_rows():
            if row["error"] == "storage":
                raise StorageError(*json.loads(row["account"]))
            if row["error"]:
                raise OSError(row["error"])
            yield json.loads(row["account"])


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Only errors of Ray Data: the progress of a pack is told by `on_progress`."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class _Outcome:
    """What was read of a source, and where it is listed."""

    source: str
    bad: Sequence[Refused]
    others: Sequence[Other]
    links: int  # that were not followed
    bad_images: str
    other_files: str

    def check(self, images_in: int, limit: float) -> None:
        """Refuse a source without an image, or with too many bad ones.

        Raises:
            DataError: names three bad images, and says where all are listed.
        """
        counts = ", ".join(
            f"{n} {reason}" for reason, n in Counter(b.reason for b in self.bad).most_common()
        )
        listed = f"each one is listed with its reason in {public_uri(self.bad_images)}"
        needed = sorted({item.detail for item in self.bad if INSTALL in item.detail})
        listed = "; ".join([*needed, listed])
        links = ""
        if self.links:
            links = (
                f"; {self.links} links were not followed: with data.follow_links=true links to "
                "files are read, wherever they lead"
            )
        if len(self.bad) == images_in:
            others = f"{len(self.others)} other file{'s' * (len(self.others) != 1)} left alone"
            raise DataError(
                f"no image under {self.source} could be read: "
                + ", ".join(filter(None, [counts, others if self.others else ""])),
                hint=(listed if self.bad else f"they are listed in {public_uri(self.other_files)}")
                + links,
            )
        if len(self.bad) > limit * images_in:
            named = ", ".join(f"{item.source} ({item.reason})" for item in _first(self.bad))
            raise DataError(
                f"{len(self.bad)} of {images_in} images under {self.source} are bad "
                f"({unequal_shares(len(self.bad) / images_in, limit)}): {counts}; such as {named}",
                hint=f"{listed}; take them away, or set data.max_bad_fraction higher and run "
                f"again: it goes on where it stopped{links}",
            )


def listed_once(others: Sequence[Other]) -> list[Other]:
    """Label files once, though several tasks may read one; as used where one of them used it."""
    of_labels: dict[tuple[str, str], Other] = {}
    for item in others:
        if item.reason in ("label", "bad_label"):
            key = item.source, item.reason
            of_labels[key] = min(item, of_labels.get(key, item), key=lambda o: o.detail)
    return [o for o in others if o.reason not in ("label", "bad_label")] + [*of_labels.values()]


def _first(bad: Sequence[Refused]) -> list[Refused]:
    """Three bad images, of different reasons where there are some."""
    by_reason = {item.reason: item for item in reversed(sorted(bad, key=lambda b: b.source))}
    first = sorted(by_reason.values(), key=lambda item: item.source)[:3]
    more = (item for item in sorted(bad, key=lambda b: b.source) if item not in first)
    return [*first, *itertools.islice(more, 3 - len(first))]


def unequal_shares(share: float, allowed: float) -> str:
    """Two shares of which the first is larger, with as many digits as it takes to see that."""
    for digits in range(2, 17):
        first, second = f"{share:.{digits}%}", f"{allowed:.{digits}%}"
        if first != second:
            break
    return f"{first[:-1]} %, allowed {second[:-1]} %"


def _warn(others: Sequence[Other]) -> None:
    """Say what may be images, or labels, and was not read."""
    for reason, what in (
        ("bad_label", "label files say no class; their images have none"),
        ("unread_archive", "archives are of kinds that are not read"),
    ):
        named = [item for item in others if item.reason == reason]
        if named:
            first = "; ".join(f"{item.source}: {item.detail}" for item in named[:3])
            log.warning("%d %s, such as %s", len(named), what, first)


def _merge(
    plan: Plan, read: Sequence[dict[str, Any]], labels: str, shard_bytes: int, source: str
) -> Merge:
    """Decide classes and the number of shards from all that was read.

    Raises:
        DataError: label ids of several files that cannot be brought together.
    """
    size = sum(run["bytes"] for account in read for run in account["runs"])
    shards = max(1, math.ceil(size / shard_bytes))
    if labels == "none":
        return Merge(shards, (), {}, {}, (), labels=False)
    for account in read:
        names = plan.name_lists[account["names"]] if account["names"] >= 0 else ()
        if names and account["max_label"] >= len(names):
            raise DataError(
                f"a label is {account['max_label']} but {plan.tasks[account['index']].paths[0]} "
                f"names only {len(names)} classes",
                hint="correct the file, or pack without labels: data.labels=none.",
            )
    found = sorted({folder for account in read for folder in account["folders"]})
    folders = found if labels == "folder" or len(found) > 1 else []
    named = sorted({name for account in read for name in account["class_names"]})
    with_ids = {account["names"] >= 0 for account in read if account["max_label"] >= 0}
    if False in with_ids and (folders or named or True in with_ids):
        raise DataError(
            f"{source} has label ids without class names beside images with named classes",
            hint="pack them apart, or without labels: data.labels=none.",
        )
    used = {account["names"] for account in read}
    lists = [names if i in used else () for i, names in enumerate(plan.name_lists)]
    classes = Classes.of([*lists, folders, named])
    return Merge(
        shards,
        classes.names,
        {name: classes.index[name] for name in named},
        {name: classes.index[name] for name in folders},
        tuple(tuple(classes.ids(names).tolist()) for names in lists),
        labels=True,
    )
