"""Packs any pile of images into shards ordered by image id, by two passes of Ray Data tasks.

First every task reads part of the source, verifies each image by decoding it, and writes runs
sorted by id (`runs.py`). Then every task takes a range of ids from all runs and writes one shard
(`merge.py`). The shards depend on the source and the arguments, not on the tasks or the machine.

All results are written atomically, each with an account beside it, so a pack that was killed goes
on with what is missing when it is started again.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pipeline.data import ledger
from pipeline.data.claim import Owner, claimed
from pipeline.data.decode import MAX_PIXELS
from pipeline.data.ledger import PackReport
from pipeline.data.merge import Merge, write_shard
from pipeline.data.runs import PackSpec, write_runs
from pipeline.data.sources import Plan, Refused, Task, list_source, plan_tasks
from pipeline.data.storage import absolute_uri, public_uri, resolve_uri
from pipeline.data.transfer import write_bytes_atomic
from pipeline.errors import DataError, StorageError

__all__ = ["MAX_IMAGE_BYTES", "PackReport", "pack"]
log = logging.getLogger("pipeline.data")

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
    shard_bytes: int = 256 * 2**20,
    row_group_images: int = 256,
    bad_images: str,
    work: str,
    on_progress: Progress | None = None,
) -> PackReport:
    """Pack the images under `source` into the folder `shards`. Needs a Ray cluster that is joined.

    Args:
        source: folder of any depth, tar, parquet or `folder/pattern*`; a path or pyarrow URI.
        shards: folder for the shards and their manifest. An older pack of the same source there is
            replaced.
        image_column: column of the images in parquet sources.
        label_column: column of the class ids in parquet sources.
        labels: "folder": the parent folder of an image is its class; "auto": only where there are
            two or more such folders; "none": no labels at all. Label columns of parquet sources are
            kept by "auto" and "folder".
        max_bad_fraction: more bad images than this part of all end the pack.
        max_pixels: images with more pixels are bad (too_large).
        max_image_bytes: encoded images with more bytes are bad (too_large).
        channels: that training will ask for (see `decode.decode_image`); an image that cannot give
            them is bad (undecodable).
        shard_bytes: about the size of a shard.
        row_group_images: rows of a row group, fewer where images are large.
        bad_images: path of the bad image table (parquet), written before anything can fail on it.
        work: folder for intermediate files, as large as the images; emptied at the end.
        on_progress: called with ("read" or "write", tasks done, tasks in all).

    Raises:
        DataError: nothing to pack, too many bad images, columns or labels that cannot be used, an
            output folder that holds something else, no space.
    """
    begin = time.monotonic()
    source, shards, work = (absolute_uri(str(uri)) for uri in (source, shards, work))
    ledger.check_places(source, shards=shards, work=work, bad_images=absolute_uri(str(bad_images)))
    listing = list_source(source)
    # All that the shards depend on. The limit of bad images is not in it: with a higher one, a pack
    # that ended on it goes on.
    arguments = [source, shards, image_column, label_column, labels, max_pixels, max_image_bytes]
    arguments += [shard_bytes, row_group_images]
    # Only where it is not RGB, so that packs made before there was a choice stay finished.
    arguments += [f"channels={channels}"] if channels != RGB else []
    key = ledger.key_of(listing, arguments)
    if (finished := ledger.finished(work, key, shards)) is not None:
        log.info("%s is packed already, nothing to do", shards)
        return finished
    if listing.hidden:
        log.info("%d hidden files under %s are left out", listing.hidden, source)
    plan = plan_tasks(source, listing, image_column, label_column, max_image_bytes)
    spec = PackSpec(
        source=source,
        root=listing.root,
        shards=shards,
        work=work,
        image_column=image_column,
        label_column=label_column,
        max_pixels=max_pixels,
        max_image_bytes=max_image_bytes,
        row_group_images=row_group_images,
        run_bytes=RUN_BYTES,
        extras=plan.extras,
        name_lists=plan.name_lists,
        channels=channels,
    )
    owner = Owner(public_uri(source), public_uri(work))
    with claimed(shards, owner, lambda: ledger.unfinished(shards)) as held:
        stale = ledger.start(work, key, source, held)
        read = _read_all(plan.tasks, spec, on_progress)
        bad = [*plan.refused, *(Refused(*row) for account in read for row in account["bad"])]
        images_in = len(plan.refused) + sum(account["images"] for account in read)
        ledger.write_bad_images(bad, bad_images)
        _check_bad(bad, images_in, max_bad_fraction, source, bad_images)
        merge = _merge(plan, read, labels, shard_bytes, source)
        held.check()
        written = _write_all(merge, read, spec, on_progress)
        held.check()
        ledger.drop(held, stale, written)
        digest = ledger.write_manifest(shards, source, merge.class_names, written)
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
        )
        if images_in != report.images_packed + report.duplicates + len(bad):
            raise RuntimeError(f"images were lost or counted twice: {report}")
        ledger.finish(work, key, shards, report)
        return report


def _read_all(
    tasks: Sequence[Task], spec: PackSpec, on_progress: Progress | None
) -> list[dict[str, Any]]:
    done = ledger.accounts(spec.work, "runs")
    work = [(i, task) for i, task in enumerate(tasks) if i not in done]

    def read(item: tuple[int, Task]) -> dict[str, Any]:
        return write_runs(*item, spec)

    return _all("read", read, work, done, on_progress)


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
) -> list[dict[str, Any]]:
    """The accounts of all items in order, those of `done` and the rest by running `function`."""
    total = len(done) + len(items)
    if done:
        log.info("%s: %d of %d tasks were finished before", what, len(done), total)
    for account in _each(function, items):
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


def _check_bad(
    bad: Sequence[Refused], images_in: int, limit: float, source: str, table: str
) -> None:
    counts = ", ".join(f"{n} {r}" for r, n in Counter(b.reason for b in bad).most_common())
    if images_in == 0 or len(bad) == images_in:
        raise DataError(
            f"no image under {source} could be read" + (f": {counts}" if bad else ""),
            hint=f"each one is listed with its reason in {table}.",
        )
    if len(bad) > limit * images_in:
        raise DataError(
            f"{len(bad)} of {images_in} images under {source} are bad "
            f"({len(bad) / images_in:.1%}, allowed {limit:.1%}): {counts}",
            hint=f"each one is listed with its reason in {table}; take them away, or set "
            "data.max_bad_fraction higher and run again: it goes on where it stopped.",
        )


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
        return Merge(shards, (), {}, (), labels=False)
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
    nameless = any(a["names"] < 0 and a["max_label"] >= 0 for a in read)
    lists = {plan.name_lists[account["names"]] for account in read if account["names"] >= 0}
    if not folders and len(lists) <= 1:
        # One list, or none: ids stay what they are in the source.
        return Merge(shards, next(iter(lists), ()), {}, ((),) * len(plan.name_lists), labels=True)
    if nameless:
        raise DataError(
            f"{source} has label ids without class names beside images with named classes",
            hint="pack them apart, or without labels: data.labels=none.",
        )
    names = tuple(sorted({*folders, *(name for names in lists for name in names)}))
    ids = {name: i for i, name in enumerate(names)}
    mapped = tuple(tuple(ids[name] for name in names) for names in plan.name_lists)
    return Merge(shards, names, {name: ids[name] for name in folders}, mapped, labels=True)
