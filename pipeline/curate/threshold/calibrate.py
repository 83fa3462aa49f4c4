"""The threshold from the user's own images: some are attacked, and it is seen what still matches.

The sample is the images with the smallest random numbers of (seed, image id), so it does not depend
on the order of the files. All of its pairs are compared, as they are; the first of its images are
attacked.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.embed.embed import Embedded, task_resources, unit_vectors
from pipeline.curate.images import descriptor
from pipeline.curate.images.equal_images import kept_count
from pipeline.curate.images.fingerprint import Decoding, groups_at
from pipeline.curate.look.forms import forms_at, opened_form
from pipeline.curate.look.look_at_pairs import VERSION
from pipeline.curate.look.second_look import Verdict, second_look
from pipeline.curate.rows.draws_by_id import CALIBRATION, draw
from pipeline.curate.rows.read_rows import own_rows
from pipeline.curate.rows.tables import (
    ID,
    InputFile,
    Inputs,
    Vectors,
    ids_of,
    list_array,
    matrix,
    read_table,
)
from pipeline.curate.steps.steps import Account, Output, Resources, Step, Steps
from pipeline.curate.threshold.attacks import ATTACKS, attacked_copies
from pipeline.curate.threshold.tail import Look
from pipeline.curate.threshold.threshold import Calibration, Sample, measure_threshold
from pipeline.embed.embedders import DESCRIPTOR, EmbedderSpec, open_embedder
from pipeline.images.shown import three_channels

log = logging.getLogger("pipeline.curate")

MEASURING = 2  # version of `measure`; another one calibrates again, as another second look does
COMPARED = 5000  # images of the sample, whose pairs show how alike different images are
FORMS = 256  # that are held for the second look
AT_ONCE = 32  # images that are attacked and then embedded


@dataclass(frozen=True)
class Sampling:
    """What a calibration is made of.

    Attributes:
        images: of the sample that are attacked.
        target: share of unlike pairs that may be taken for copies.
        seed: of the sample and of the attacks.
    """

    images: int = 500
    target: float = 1e-6
    seed: int = 0

    @property
    def compared(self) -> int:
        """Images of the sample."""
        return max(COMPARED, self.images)


def calibrate(
    steps: Steps,
    inputs: Inputs,
    prints: Step,
    equal: Step,
    embedded: Embedded,
    sampling: Sampling,
    decoding: Decoding,
) -> Calibration:
    """The similarity above which two images of the set may be copies, and are looked at.

    Args:
        steps: of the curation.
        inputs: all images.
        prints: fingerprints of them.
        equal: of `equal_images`; the sample is of rows that are their own keeper.
        embedded: vectors of all these rows.
        sampling: how many images, for what.
        decoding: of the images, for the attacks and the second look.
    """
    spec, vectors = embedded.spec, embedded.vectors
    # Twice what is needed and then some goes to the driver, which takes the smallest.
    below = min(1.0, (2 * sampling.compared + 100) / max(1, kept_count(equal)))
    drawn = steps.run("calibrate_sample", draw_rows, inputs.by_name, version=3, prints=prints,
                      equal=equal, below=below, seed=sampling.seed)  # fmt: skip
    rows = [row for _, _, row in sorted(tuple(d) for a in drawn.accounts for d in a["drawn"])]
    # Images as they are say how alike different ones are; attacked ones, which copies are found.
    sample = _by_file(inputs, rows[: sampling.compared])
    gathered = steps.run("calibrate_gathered", gather_vectors, sample, vectors=vectors)
    resources = Resources() if spec.kind == DESCRIPTOR else task_resources()
    attacked = _by_file(inputs, rows[: sampling.images])
    copies = steps.run("calibrate_copies", attack_rows, attacked, resources, spec=spec,
                       seed=sampling.seed, max_pixels=decoding.max_pixels)  # fmt: skip
    shown = Shown(tuple(one.file for one in sample.values()), decoding)
    measured = steps.run("calibrate", measure, {"calibration": sampling.target},
                         version=(MEASURING, VERSION), gathered=gathered, copies=copies,
                         views=vectors.views, shown=shown)  # fmt: skip
    calibration = Calibration.of_json(measured.accounts[0]["calibration"])
    log.info("threshold   %s", calibration.line())
    if calibration.warning:
        log.warning("calibration: %s", calibration.warning)
    return calibration


@dataclass(frozen=True)
class SampleRows:
    """Some rows of a file, ascending."""

    file: InputFile
    rows: tuple[int, ...]


def _by_file(inputs: Inputs, rows: Sequence[int]) -> dict[str, SampleRows]:
    """Rows by the file that they are in, a task each."""
    firsts = [file.first for file in inputs.files]
    chosen: dict[int, list[int]] = {}
    for row in sorted(rows):
        chosen.setdefault(bisect_right(firsts, row) - 1, []).append(row)
    files = [SampleRows(inputs.files[index], tuple(chosen[index])) for index in sorted(chosen)]
    return {one.file.name: one for one in files}


def draw_rows(
    out: Output, file: InputFile, prints: Step, equal: Step, below: float, seed: int
) -> Account:
    """Task: the rows of a file whose random number is low, as (number, id, row)."""
    rows = own_rows(equal.folder, file.name)
    about = prints.read(file.name, ["row", "image_id"])
    ids = ids_of(about["image_id"])[np.searchsorted(about["row"].to_numpy(), rows)]
    numbers = draw(seed, 0, ids, CALIBRATION)
    low = np.flatnonzero(numbers < below)
    drawn = [[float(numbers[i]), ids[i].tobytes().hex(), int(rows[i])] for i in low]
    return {"rows": len(rows), "drawn": drawn}


def gather_vectors(out: Output, chosen: SampleRows, vectors: Vectors) -> None:
    """Task: vectors of some rows of a file, as far as they have one."""
    inside = [("row", "in", list(chosen.rows))]
    columns = ["row", "image_id", vectors.column, *["views"] * vectors.views]
    table = read_table(vectors.folder, chosen.file.name, columns, inside)
    out.table(table.rename_columns(["row", "image_id", "vector", *["views"] * vectors.views]))


def attack_rows(
    out: Output, chosen: SampleRows, spec: EmbedderSpec, seed: int, max_pixels: int
) -> None:
    """Task: vectors of the nine copies of some images of a file."""
    embedder = None if spec.kind == DESCRIPTOR else open_embedder(spec, out.gpu, out.threads)
    channels = 3 if embedder is None else embedder.channels
    decoding, file = Decoding(channels, max_pixels), chosen.file
    ids: list[bytes] = []
    vectors: list[Any] = []
    views: list[Any] = []

    def copied(one: tuple[bytes, bytes]) -> Any:
        pixels = decoding.pixels(one[1], file.columns.value_range)
        copies = attacked_copies(three_channels(pixels), one[0], seed)[1:]
        if embedder is None:
            return [descriptor.describe(copy) for copy in copies]
        return [embedder.prepare(_channels(copy, channels)) for copy in copies]

    with ThreadPoolExecutor(out.threads) as pool:
        for group, places, _ in groups_at(file, np.asarray(chosen.rows) - file.first):
            for at in range(0, len(places), AT_ONCE):
                part = places[at : at + AT_ONCE].tolist()
                encoded = [(group.image_ids[p].tobytes(), group.image(p)) for p in part]
                copies = [copy for of_image in pool.map(copied, encoded) for copy in of_image]
                ids += [name for name, _ in encoded]
                if embedder is None:
                    vectors.append(np.stack([full for full, _ in copies]))
                    views.append(np.stack([crops for _, crops in copies]))
                else:
                    vectors.append(unit_vectors(embedder, copies))
    columns: dict[str, Any] = {
        "image_id": pa.array(ids, ID),
        "vectors": list_array(np.concatenate(vectors).reshape(len(ids), -1)),
    }
    if views:
        columns["views"] = list_array(np.concatenate(views).reshape(len(ids), -1))
    out.table(pa.table(columns))


def _channels(rgb: Any, channels: int) -> Any:
    """[H, W, 3] with another number of channels: its own ones again and again."""
    return rgb if channels == 3 else np.ascontiguousarray(rgb[..., np.arange(channels) % 3])


@dataclass(frozen=True)
class Shown:
    """Where the images of the sample are, for the second look at some pairs of them."""

    files: tuple[InputFile, ...]
    decoding: Decoding


class Looker:
    """The second look at two images of the sample; decodes what it needs."""

    def __init__(self, shown: Shown, rows: Sequence[int]) -> None:
        self._shown, self._rows = shown, np.asarray(rows, np.int64)
        self._firsts = [file.first for file in shown.files]
        self._stored: dict[int, bytes] = {}
        self._opened = lru_cache(maxsize=FORMS)(self._open)

    def fetch(self, places: Sequence[int]) -> None:
        """Decodes images that are looked at next, so that each row group is read once for all."""
        self._stored = {at: self._stored[at] for at in places if at in self._stored}
        missing = np.array([at for at in places if at not in self._stored], np.int64)
        missing = missing[np.argsort(self._rows[missing])]
        index = np.searchsorted(self._firsts, self._rows[missing], side="right") - 1
        for one in np.unique(index).tolist():
            file, mine = self._shown.files[one], missing[index == one]
            stored_forms = forms_at(file, self._rows[mine] - file.first, self._shown.decoding)
            for at, (_, form) in zip(mine.tolist(), stored_forms, strict=True):
                self._stored[at] = form

    def _open(self, place: int) -> Any:
        if place not in self._stored:
            self.fetch([*self._stored, place])
        stored = self._stored[place]
        return opened_form(stored) if stored else None

    def look(self, a: int, b: int) -> Verdict:
        """At two images, by their places."""
        one, other = self._opened(a), self._opened(b)
        if one is None or other is None:
            return Verdict(False, "undecided", 0.0, (0.5, 0.5))
        return second_look(one, other)


def measure(
    out: Output, target: float, gathered: Step, copies: Step, views: bool, shown: Shown
) -> Account:
    """Task: the calibration of what `gather_vectors` and `attack_rows` wrote."""
    sample = _read(gathered)
    looker = Looker(shown, [] if sample is None else sample["row"].to_pylist())
    pairs = replace(sample_of(sample, _read(copies), views, looker.look), fetch=looker.fetch)
    calibration = measure_threshold(pairs, target)
    return {"rows": calibration.images, "calibration": calibration.to_json()}


def _read(step: Step) -> pa.Table | None:
    tables = [step.read(name) for name in step.tables]
    return pa.concat_tables(tables).combine_chunks().sort_by("image_id") if tables else None


def sample_of(
    gathered: pa.Table | None, copies: pa.Table | None, views: bool, look: Look
) -> Sample:
    """The sample, ordered by image id; copies of images that have no vector are left out."""
    if gathered is None or copies is None:
        none, places = np.zeros((0, 1), np.float16), np.zeros(0, np.int64)
        crops = np.zeros((0, descriptor.VIEWS, 1), np.float16) if views else None
        return Sample(none, crops, look, places, none, crops)
    names, of = (
        ids_of(table["image_id"]).copy().view("V16").ravel() for table in (gathered, copies)
    )
    place = {name.tobytes(): at for at, name in enumerate(names)}
    there = np.array([name.tobytes() in place for name in of], bool)
    copies = copies.filter(pa.array(there))
    m, h = len(gathered), len(copies)

    def numbers(table: pa.Table, name: str, *shape: int) -> Any:
        width = table.schema.field(name).type.list_size
        return matrix(table[name], width).reshape(*shape, width // math.prod(shape[1:]))

    return Sample(
        vectors=numbers(gathered, "vector", m),
        crops=numbers(gathered, "views", m, descriptor.VIEWS) if views else None,
        look=look,
        originals=np.array([place[name.tobytes()] for name in of[there]], np.int64),
        copies=numbers(copies, "vectors", h, len(ATTACKS)),
        copies_crops=numbers(copies, "views", h, len(ATTACKS), descriptor.VIEWS) if views else None,
    )
