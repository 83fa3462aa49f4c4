"""The threshold from the user's own images: some are attacked, and it is seen what still matches.

The sample is the images with the smallest random numbers of (seed, image id), so it does not depend
on the order of the files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.curate import descriptor
from pipeline.curate.attacks import ATTACKS, attack
from pipeline.curate.embedders import DESCRIPTOR, EmbedderSpec, opened
from pipeline.curate.fingerprint import groups_of
from pipeline.curate.measure import three_channels
from pipeline.curate.same_picture import SIDE
from pipeline.curate.tables import ID, InputFile, Inputs, ids_of, matrix, read_table, write_table
from pipeline.curate.threshold import Attacked, Calibration, measure_threshold
from pipeline.curate.work import Account, Result, Task, run_step
from pipeline.data.bad_image import MAX_PIXELS
from pipeline.data.decode import decode_image
from pipeline.data.draws import uniforms
from pipeline.uri import Place

log = logging.getLogger("pipeline.curate")

STEP = "calibrate"
SAMPLE_STREAM = 3  # of data.draws
LONGEST = 400  # pixels: larger images are made so small before they are attacked
_COPIES = 1 + len(ATTACKS)


def calibrate(
    root: Place,
    inputs: Inputs,
    fingerprints: Result,
    alive: Result,
    spec: EmbedderSpec,
    *,
    images: int = 500,
    target: float = 1e-6,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
    step: str = STEP,
) -> tuple[Calibration, Result]:
    """The threshold above which two images of the set are copies.

    Args:
        root: folder of the curation.
        inputs: all images.
        fingerprints: of all inputs.
        alive: of `exact_copies.collapse`; the sample is of rows that are their own keeper.
        spec: the embedder that finds copies.
        images: of the sample.
        target: share of unlike pairs that may be taken for copies.
        seed: of the sample and of the attacks.
        max_pixels: larger images are refused.
        step: its name.

    Returns:
        the calibration, and the step that measured it.
    """
    rows = int(alive.total("rows"))
    # Twice what is needed and then some goes to the driver, which takes the smallest.
    below = min(1.0, (2 * images + 100) / max(1, rows))
    tasks = [
        Task(file.name, (file.name, fingerprints.folder, alive.folder, below, seed))
        for file in inputs.files
    ]
    keys = [1, fingerprints.key, alive.key, images, seed]
    drawn = run_step(root, f"{step}_sample", keys, tasks, draw_file)
    ranked = sorted(
        (float(draw), str(name), int(row))
        for account in drawn.accounts
        for draw, name, row in account["drawn"]
    )
    chosen: dict[int, list[int]] = {}
    for _, _, row in ranked[:images]:
        file, place = inputs.place(row)
        chosen.setdefault(file.index, []).append(place)
    files = [(inputs.files[index], sorted(places)) for index, places in sorted(chosen.items())]
    tasks = [Task(f.name, (f, places, spec, seed, max_pixels)) for f, places in files]
    made = run_step(root, f"{step}_copies", [drawn.key, spec.settings], tasks, attack_file)
    names = [file.name for file, _ in files]
    task = Task("calibration", (made.folder, names, spec.kind == DESCRIPTOR, target))
    found = run_step(root, step, [made.key, target], [task], measure_task)
    calibration = Calibration.of_json(found.accounts[0]["calibration"])
    if calibration.warning:
        log.warning("calibration: %s", calibration.warning)
    return calibration, found


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
    found = [[float(draws[i]), array[i].tobytes().hex(), int(numbers[i])] for i in low]
    return {"rows": len(draws), "drawn": found}


def attack_file(
    folder: str,
    file: InputFile,
    places: Sequence[int],
    spec: EmbedderSpec,
    seed: int,
    max_pixels: int = MAX_PIXELS,
) -> Account:
    """Task: vectors of some images of a file, and of their nine copies."""
    embedder = None if spec.kind == DESCRIPTOR else opened(spec)
    starts = np.cumsum([0, *file.file.row_groups])
    groups = np.searchsorted(starts, places, side="right") - 1
    ids: list[bytes] = []
    vectors, crops, pictures = [], [], []
    for number in np.unique(groups).tolist():
        group, _ = next(groups_of(file, [number]))
        for place in np.asarray(places)[groups == number] - starts[number]:
            channels = 3 if embedder is None else embedder.channels
            pixels = decode_image(group.image(int(place)), channels, max_pixels)
            ids.append(group.image_ids[place].tobytes())
            copies = copies_of(three_channels(pixels), ids[-1], seed)
            pictures.append(picture(copies[0]).ravel())
            if embedder is None:
                found = [descriptor.describe(copy) for copy in copies]
                vectors.append(np.stack([full for full, _ in found]).ravel())
                crops.append(np.stack([views for _, views in found]).ravel())
            else:
                fitted = [_channels(copy, embedder.channels) for copy in copies]
                made = embedder.embed([embedder.prepare(copy) for copy in fitted])
                vectors.append(made.ravel())
    columns: dict[str, Any] = {
        "image_id": pa.array(ids, ID),
        "vectors": _lists(vectors),
        "pictures": pa.array([p.tobytes() for p in pictures], pa.binary(SIDE * SIDE)),
    }
    if crops:
        columns["crops"] = _lists(crops)
    return {"rows": len(ids), "bytes": write_table(pa.table(columns), folder, file.name)}


def copies_of(rgb: Any, image_id: bytes, seed: int = 0) -> list[Any]:
    """An image and its nine copies, at most LONGEST pixels long; tiny sides are enlarged to 8."""
    height, width = rgb.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    if size != (width, height):
        rgb = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
    return [rgb, *(attack(rgb, name, image_id, seed) for name in ATTACKS)]


def picture(rgb: Any) -> Any:
    """What `same_picture` compares: uint8 [64, 64] grey."""
    grey = Image.fromarray(rgb).convert("L")
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _channels(rgb: Any, channels: int) -> Any:
    """[H, W, 3] with another number of channels: its own ones again and again."""
    return rgb if channels == 3 else np.ascontiguousarray(rgb[..., np.arange(channels) % 3])


def _lists(rows: Sequence[Any]) -> pa.Array:
    stacked = np.stack(rows)
    return pa.FixedSizeListArray.from_arrays(pa.array(stacked.ravel()), stacked.shape[1])


def measure_task(folder: str, copies: str, names: Sequence[str], views: bool, target: float) -> Any:
    """Task: the calibration from the vectors of all copies, ordered by image id."""
    tables = [read_table(copies, name) for name in names]
    return {"rows": 0, "calibration": measure_threshold(attacked(tables, views), target).to_json()}


def attacked(tables: Sequence[pa.Table], views: bool) -> Attacked:
    """The sample in what `attack_file` wrote."""
    if not tables:
        crops = np.zeros((0, _COPIES, 9, 1), np.float16) if views else None
        nothing = np.zeros((0, _COPIES, 1), np.float16)
        return Attacked(nothing, crops, np.zeros((0, SIDE, SIDE), np.uint8))
    table = pa.concat_tables(tables).combine_chunks().sort_by("image_id")
    images = len(table)

    def numbers(name: str) -> Any:
        width = table.schema.field(name).type.list_size
        return matrix(table.column(name), width).reshape(images, _COPIES, -1)

    pictures = b"".join(value.as_py() for value in table.column("pictures"))
    return Attacked(
        numbers("vectors"),
        numbers("crops").reshape(images, _COPIES, descriptor.VIEWS, -1) if views else None,
        np.frombuffer(pictures, np.uint8).reshape(images, SIDE, SIDE),
    )
