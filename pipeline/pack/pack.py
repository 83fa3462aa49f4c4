"""Packs any pile of images into shards ordered by image id, by two passes of Ray Data tasks.

First every task reads part of the source, verifies each image by decoding it, and writes runs
sorted by id (`sorted_runs.py`). Then every task takes a range of ids from all runs and writes one
shard (`merge.py`). The shards depend on the source and the options, not on the tasks or the
machine.

All results are written atomically, each with an account beside it (`ledger.py`). So a pack that was
killed goes on with what is missing when it is started again.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.errors import DataError, StorageError
from pipeline.images.decode import MAX_PIXELS
from pipeline.images.value_range import AUTO, FULL, Sample, ValueRange
from pipeline.log import only_errors
from pipeline.pack import duplicates, ledger
from pipeline.pack.bad_files import Outcome, PackReport
from pipeline.pack.duplicates import Progress
from pipeline.pack.listing import list_source
from pipeline.pack.merge import Merge, merge_of, write_shard
from pipeline.pack.sorted_runs import INDEX_VERSION, PackSpec, write_runs
from pipeline.pack.source_places import absolute_source, check_places
from pipeline.pack.sources import Reading, Task, plan_tasks
from pipeline.storage.claim import Owner, claimed
from pipeline.storage.places import absolute_uri, public_uri, resolve_uri
from pipeline.storage.transfer import write_bytes_atomic
from pipeline.uri import join, parent

__all__ = ["MAX_IMAGE_BYTES", "PackOptions", "PackPlaces", "PackReport", "pack"]
log = logging.getLogger("pipeline.pack")

RGB = 3  # channels
RUN_BYTES = 128 * 2**20  # of images in memory of one task before they are written
MAX_IMAGE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class PackOptions:
    """How a source is read and what its shards are like.

    Attributes:
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
        label_member: ending of the files beside images that hold their labels (`labels`); "" for
            none. Not looked at where labels is "folder" or "none".
        follow_links: read what links to files lead to, wherever that is.
    """

    image_column: str = "image"
    label_column: str = "label"
    labels: Literal["auto", "folder", "none"] = "auto"
    max_bad_fraction: float = 0.01
    max_pixels: int = MAX_PIXELS
    max_image_bytes: int = MAX_IMAGE_BYTES
    channels: int = RGB
    value_range: ValueRange | Literal["auto-from-sample"] = AUTO
    shard_bytes: int = 256 * 2**20
    row_group_images: int = 256
    label_member: str = "cls"
    follow_links: bool = False

    @property
    def reading(self) -> Reading:
        """What reading needs of it."""
        return Reading(
            self.image_column,
            self.label_column,
            self.max_image_bytes,
            labels=self.labels != "none",
            label_member=self.label_member if self.labels == "auto" else "",
        )

    def key(self) -> list[Any]:
        """All options that the shards depend on.

        The limit of bad images is not among them: with a higher one, a pack that ended on it goes
        on. Options that came later are named only where they are not as before, so that packs made
        without them stay finished.
        """
        values: list[Any] = [self.image_column, self.label_column, self.labels]
        values += [self.max_pixels, self.max_image_bytes, self.shard_bytes, self.row_group_images]
        values += [f"channels={self.channels}"] if self.channels != RGB else []
        named = self.labels == "auto" and self.label_member != "cls"
        values += [f"label_member={self.label_member}"] if named else []
        values += ["follow_links"] if self.follow_links else []
        values += [f"range={self.value_range}"] if self.value_range != AUTO else []
        return values


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


@dataclass(frozen=True)
class PackPlaces:
    """Where a pack writes what are no shards; paths or pyarrow URIs.

    Attributes:
        bad_images: the table of bad images (parquet), written before anything can fail on them.
        scratch: folder for intermediate files, as large as the images; emptied at the end.
        other_files: the table (parquet) of files that are no images and were left alone; default:
            `other_files.parquet` beside `bad_images`.
        duplicates: the table of images that are byte for byte like one that was packed; default:
            `duplicates.parquet` beside `bad_images`.
    """

    bad_images: str
    scratch: str
    other_files: str = ""
    duplicates: str = ""

    def absolute(self) -> PackPlaces:
        """The same from any working directory, with the defaults filled in."""
        bad_images = absolute_uri(self.bad_images)
        beside = parent(bad_images)[0]
        others = self.other_files or str(join(beside, "other_files.parquet"))
        copies = self.duplicates or str(join(beside, "duplicates.parquet"))
        return PackPlaces(bad_images, absolute_uri(self.scratch), others, copies)


@_storage_errors()
def pack(
    source: str,
    shards: str,
    places: PackPlaces,
    options: PackOptions | None = None,
    *,
    field: str = "data.source",
    on_progress: Progress | None = None,
) -> PackReport:
    """Pack the images under `source` into the folder `shards`. Needs a Ray cluster that is joined.

    Args:
        source: folder of any depth, archive, parquet, a pattern such as `folder/**/*.jpg`, or
            several of them with commas between; paths or pyarrow URIs.
        shards: folder for the shards and their manifest. An older pack of the same source there is
            replaced.
        places: of the lists and the intermediate files.
        options: how.
        field: of the config, for sentences about the source.
        on_progress: called with ("read" or "write", tasks done, tasks in all).

    Raises:
        DataError: nothing to pack, too many bad images, columns or labels that cannot be used, an
            output folder that holds something else, no space.
    """
    begin = time.monotonic()
    options = options or PackOptions()
    source, shards = absolute_source(str(source)), absolute_uri(str(shards))
    places = places.absolute()
    scratch = places.scratch

    # What is there, and whether it is packed already.
    listing = list_source(source, follow_links=options.follow_links, field=field)
    outputs = {"shards": shards, "work": scratch, "bad_images": places.bad_images}
    check_places(source, outputs, field)
    key = ledger.key_of(listing, [source, shards, *options.key()])
    if (finished := ledger.finished(scratch, key, shards)) is not None:
        log.info("%s is packed already, nothing to do", shards)
        return finished
    plan = plan_tasks(source, listing, options.reading)
    spec = PackSpec(
        source=listing.uri,
        root=listing.root,
        shards=shards,
        scratch=scratch,
        reading=replace(options.reading, extras=plan.extras),
        max_pixels=options.max_pixels,
        row_group_images=options.row_group_images,
        run_bytes=RUN_BYTES,
        name_lists=plan.name_lists,
        channels=options.channels,
        labelled=plan.labelled,
        value_range=options.value_range,
    )
    owner = Owner(public_uri(source), public_uri(scratch))
    with claimed(shards, owner, lambda: ledger.unfinished(shards)) as claim:
        stale = ledger.start(scratch, key, INDEX_VERSION, source, claim)

        # First pass: every image is read and verified. What is bad is listed before it is judged.
        sample = Sample()
        read = _read_all(plan.tasks, spec, sample, on_progress)
        listed_in = {"bad_images": places.bad_images, "other_files": places.other_files}
        outcome = Outcome.of(listing, plan, read, source=source, **listed_in)
        outcome.write()
        outcome.check(options.max_bad_fraction)

        # What only all images together decide: the range of their values, classes, shards.
        used = sample.range
        value_range = (used or FULL) if options.value_range == AUTO else options.value_range
        merge = merge_of(plan, read, options.labels, options.shard_bytes, source, value_range)

        # Second pass: the shards. The manifest comes last, as only with it they are a set.
        claim.check()
        written = _write_all(merge, read, spec, on_progress)
        claim.check()
        ledger.drop(claim, stale, written)
        duplicates.write_duplicates(places.duplicates, scratch, written, on_progress)
        digest = ledger.write_manifest(
            shards, source, merge.class_names, written, value_range, used
        )
        report = PackReport(
            images_in=outcome.images_in,
            images_packed=sum(account["rows"] for account in written),
            duplicates=sum(account["duplicates"] for account in written),
            bad=dict(sorted(Counter(item.reason for item in outcome.bad).items())),
            bytes=sum(account["bytes"] for account in written),
            shards=sum(account["rows"] > 0 for account in written),
            digest=digest,
            class_names=merge.class_names,
            seconds=round(time.monotonic() - begin, 3),
            retries=sum(account.get("retries", 0) for account in [*read, *written]),
            others=dict(sorted(Counter(item.reason for item in outcome.others).items())),
            value_range=value_range,
            used_range=used,
            disagreeing=sum(account["disagreeing"] for account in written),
        )
        if report.images_in != report.images_packed + report.duplicates + len(outcome.bad):
            raise RuntimeError(f"images were lost or counted twice: {report}")
        ledger.finish(scratch, key, shards, report)
        return report


def _read_all(
    tasks: Sequence[Task], spec: PackSpec, sample: Sample, on_progress: Progress | None
) -> list[dict[str, Any]]:
    done = ledger.accounts(spec.scratch, "runs", sample.take)
    missing = [(i, task) for i, task in enumerate(tasks) if i not in done]

    def read(item: tuple[int, Task]) -> dict[str, Any]:
        return write_runs(*item, spec)

    return _all("read", read, missing, done, on_progress, sample.take)


def _write_all(
    merge: Merge, read: Sequence[dict[str, Any]], spec: PackSpec, on_progress: Progress | None
) -> list[dict[str, Any]]:
    fs, folder = resolve_uri(spec.scratch)
    runs = [run for account in read for run in account["runs"]]
    write_bytes_atomic(json.dumps(runs).encode(), fs, f"{folder}/runs.json")
    done = ledger.written(spec)
    missing = [i for i in range(merge.shards) if i not in done]

    def write(index: int) -> dict[str, Any]:
        return write_shard(index, merge, spec)

    return _all("write", write, missing, done, on_progress)


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
    with only_errors("ray.data"):  # its progress is told by `on_progress`
        for row in dataset.iter_rows():
            if row["error"] == "storage":
                raise StorageError(*json.loads(row["account"]))
            if row["error"]:
                raise OSError(row["error"])
            yield json.loads(row["account"])
