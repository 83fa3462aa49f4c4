"""The threshold from the user's own images: some are attacked, and it is seen what still matches.

The sample is the images with the smallest random numbers of (seed, image id), so it does not depend
on the order of the files. All of its pairs are compared, as they are; the first of its images are
attacked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.curate.embed import embed
from pipeline.curate.images import descriptor, exact_copies
from pipeline.curate.images.fingerprint import groups_of
from pipeline.curate.images.measure import three_channels
from pipeline.curate.look.forms import forms_at, opened_form
from pipeline.curate.look.looks import VERSION
from pipeline.curate.look.second_look import Verdict, second_look
from pipeline.curate.rows.tables import (
    ID,
    InputFile,
    Inputs,
    Vectors,
    ids_of,
    list_array,
    matrix,
    read_table,
    write_table,
)
from pipeline.curate.steps.steps import Account, Result, Task, run_step
from pipeline.curate.threshold.attacks import ATTACKS, attack
from pipeline.curate.threshold.tail import Look
from pipeline.curate.threshold.threshold import Calibration, Sample, measure_threshold
from pipeline.embed.embedders import DESCRIPTOR, EmbedderSpec, open_embedder
from pipeline.images.bad_image import MAX_PIXELS
from pipeline.images.decode import decode_image
from pipeline.uri import Place
from pipeline.views.draws import uniforms

log = logging.getLogger("pipeline.curate")

STEP = "calibrate"
DRAWING, MEASURING = 3, 2  # versions, in the keys: another one draws, or measures, anew
COMPARED = 5000  # images of the sample, whose pairs show how alike different images are
SAMPLE_STREAM = 3  # of views.draws
LONGEST = 400  # pixels: larger images are made so small before they are attacked
FORMS = 256  # that are held for the second look
AT_ONCE = 32  # images that are attacked and then embedded


def calibrate(
    root: Place,
    inputs: Inputs,
    fingerprints: Result,
    exact: Result,
    spec: EmbedderSpec,
    vectors: Vectors,
    *,
    images: int = 500,
    target: float = 1e-6,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
    channels: int = 3,
    step: str = STEP,
) -> tuple[Calibration, Result]:
    """The similarity above which two images of the set may be copies, and are looked at.

    Args:
        root: folder of the curation.
        inputs: all images.
        fingerprints: of all inputs.
        exact: of `exact_copies.collapse`; the sample is of rows that are their own keeper.
        spec: the embedder that finds copies.
        vectors: of it, of all these rows.
        images: that are attacked.
        target: share of unlike pairs that may be taken for copies.
        seed: of the sample and of the attacks.
        max_pixels: larger images are refused.
        channels: of an image, as it is decoded for the second look.
        step: its name.

    Returns:
        the calibration, and the step that measured it.
    """
    rows, most = exact_copies.own(exact), max(COMPARED, images)
    # Twice what is needed and then some goes to the driver, which takes the smallest.
    below = min(1.0, (2 * most + 100) / max(1, rows))
    tasks = [
        Task(file.name, (file.name, fingerprints.folder, exact.folder, below, seed))
        for file in inputs.files
    ]
    keys = [DRAWING, fingerprints.key, exact.key, most, seed]
    drawn = run_step(root, f"{step}_sample", keys, tasks, draw_file)
    ranked = sorted(
        (float(draw), str(name), int(row))
        for account in drawn.accounts
        for draw, name, row in account["drawn"]
    )
    rows_of = [row for _, _, row in ranked]
    files = _by_file(inputs, rows_of[:most])
    tasks = [Task(file.name, (file.name, rows, vectors)) for file, rows in files]
    gathered = run_step(root, f"{step}_gathered", [drawn.key, vectors.key], tasks, gather_file)
    gpus, cpus = (0.0, 1.0) if spec.kind == DESCRIPTOR else embed.task_resources()
    mine = _by_file(inputs, rows_of[:images])
    tasks = [
        Task(file.name, (file, rows, spec, seed, max_pixels, bool(gpus), int(cpus)))
        for file, rows in mine
    ]
    keys = [drawn.key, images, spec.settings]
    attacked = run_step(root, f"{step}_copies", keys, tasks, attack_file, cpus=cpus, gpus=gpus)
    folders = [
        (gathered.folder, [file.name for file, _ in files]),
        (attacked.folder, [file.name for file, _ in mine]),
    ]
    shown = Shown(tuple(file for file, _ in files), channels, max_pixels)
    task = Task("calibration", (*folders, vectors.views, target, shown))
    keys = [MEASURING, VERSION, gathered.key, attacked.key, target, channels, max_pixels]
    measured = run_step(root, step, keys, [task], measure_task)
    calibration = Calibration.of_json(measured.accounts[0]["calibration"])
    log.info("threshold   %s", calibration.line())
    if calibration.warning:
        log.warning("calibration: %s", calibration.warning)
    return calibration, measured


def _by_file(inputs: Inputs, rows: Sequence[int]) -> list[tuple[InputFile, list[int]]]:
    """Rows by the file that they are in, ascending."""
    chosen: dict[int, list[int]] = {}
    for row in sorted(rows):
        chosen.setdefault(inputs.place(row)[0].index, []).append(row)
    return [(inputs.files[index], places) for index, places in sorted(chosen.items())]


def draw_file(
    folder: str, name: str, fingerprints: str, exact: str, below: float, seed: int
) -> Account:
    """Task: the rows of a file whose random number is low, as (number, id, row)."""
    rows = read_table(exact, name, ["row", "keeper"])
    row, keeper = rows.column("row").to_numpy(), rows.column("keeper").to_numpy()
    about = read_table(fingerprints, name, ["row", "image_id"])
    place = np.searchsorted(about.column("row").to_numpy(), row[row == keeper])
    chosen = about.take(pa.array(place))
    array = ids_of(chosen.column("image_id"))
    draws = uniforms(seed, 0, array, 1, SAMPLE_STREAM)[:, 0]
    low = np.flatnonzero(draws < below)
    numbers = chosen.column("row").to_numpy()
    drawn = [[float(draws[i]), array[i].tobytes().hex(), int(numbers[i])] for i in low]
    return {"rows": len(draws), "drawn": drawn}


def gather_file(folder: str, name: str, rows: Sequence[int], vectors: Vectors) -> Account:
    """Task: vectors of some rows of a file, as far as they have one."""
    chosen = [("row", "in", list(rows))]
    columns = ["row", "image_id", vectors.column, *["views"] * vectors.views]
    table = read_table(vectors.folder, name, columns, chosen)
    written: dict[str, Any] = {
        "row": table["row"],
        "image_id": table["image_id"],
        "vector": table[vectors.column],
    }
    if vectors.views:
        written["views"] = table["views"]
    return {"rows": len(table), "bytes": write_table(pa.table(written), folder, name)}


def attack_file(
    folder: str,
    file: InputFile,
    rows: Sequence[int],
    spec: EmbedderSpec,
    seed: int,
    max_pixels: int = MAX_PIXELS,
    gpu: bool = False,
    threads: int = 1,
) -> Account:
    """Task: vectors of the nine copies of some images of a file."""
    embedder = None if spec.kind == DESCRIPTOR else open_embedder(spec, gpu, threads)
    channels = 3 if embedder is None else embedder.channels
    places = np.asarray(rows) - file.first
    starts = np.cumsum([0, *file.file.row_groups])
    groups = np.searchsorted(starts, places, side="right") - 1
    ids: list[bytes] = []
    vectors: list[Any] = []
    views: list[Any] = []

    def copied(one: tuple[bytes, bytes]) -> Any:
        pixels = decode_image(one[1], channels, max_pixels, file.columns.value_range)
        copies = attacked_copies(three_channels(pixels), one[0], seed)[1:]
        if embedder is None:
            return [descriptor.describe(copy) for copy in copies]
        return [embedder.prepare(_channels(copy, channels)) for copy in copies]

    with ThreadPoolExecutor(threads) as pool:
        for number in np.unique(groups).tolist():
            group, _ = next(groups_of(file, [number]))
            these = (places[groups == number] - starts[number]).tolist()
            for at in range(0, len(these), AT_ONCE):
                part = these[at : at + AT_ONCE]
                encoded = [(group.image_ids[p].tobytes(), group.image(p)) for p in part]
                copies = [copy for of_image in pool.map(copied, encoded) for copy in of_image]
                ids += [name for name, _ in encoded]
                if embedder is None:
                    vectors.append(np.stack([full for full, _ in copies]))
                    views.append(np.stack([crops for _, crops in copies]))
                else:
                    vectors.append(embed.unit_vectors(embedder, copies))
    columns: dict[str, Any] = {
        "image_id": pa.array(ids, ID),
        "vectors": list_array(np.concatenate(vectors).reshape(len(ids), -1)),
    }
    if views:
        columns["views"] = list_array(np.concatenate(views).reshape(len(ids), -1))
    return {"rows": len(ids), "bytes": write_table(pa.table(columns), folder, file.name)}


def attacked_copies(rgb: Any, image_id: bytes, seed: int = 0) -> list[Any]:
    """An image and its nine copies, at most LONGEST pixels long; tiny sides are enlarged to 8."""
    height, width = rgb.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    if size != (width, height):
        rgb = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
    return [rgb, *(attack(rgb, name, image_id, seed) for name in ATTACKS)]


def _channels(rgb: Any, channels: int) -> Any:
    """[H, W, 3] with another number of channels: its own ones again and again."""
    return rgb if channels == 3 else np.ascontiguousarray(rgb[..., np.arange(channels) % 3])


Written = tuple[str, Sequence[str]]  # a folder and the names of its tables


@dataclass(frozen=True)
class Shown:
    """Where the images of the sample are, for the second look at some pairs of them."""

    files: tuple[InputFile, ...]
    channels: int
    max_pixels: int


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
            stored_forms = forms_at(
                file, self._rows[mine] - file.first, self._shown.channels, self._shown.max_pixels
            )
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


def measure_task(
    folder: str, gathered: Written, copies: Written, views: bool, target: float, shown: Shown
) -> Account:
    """Task: the calibration of what `gather_file` and `attack_file` wrote."""
    sample = _read(gathered)
    looker = Looker(shown, [] if sample is None else sample["row"].to_pylist())
    pairs = replace(sample_of(sample, _read(copies), views, looker.look), fetch=looker.fetch)
    calibration = measure_threshold(pairs, target)
    return {"rows": calibration.images, "calibration": calibration.to_json()}


def _read(written: Written) -> pa.Table | None:
    tables = [read_table(written[0], name) for name in written[1]]
    if not tables:
        return None
    return pa.concat_tables(tables).combine_chunks().sort_by("image_id")


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
