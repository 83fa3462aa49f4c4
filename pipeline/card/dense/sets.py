"""Images with a mask or a depth map each, from a folder or parquet; `opening.py` opens them.

Shapes: n images, H x W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from pyarrow import fs as pafs

from pipeline.errors import DataError, StorageError
from pipeline.images.bad_image import MAX_PIXELS, BadImage
from pipeline.images.decode import decode_image
from pipeline.images.value_range import FULL, ValueRange
from pipeline.shards.columns import image_id
from pipeline.shards.row_group import image_array, values_of
from pipeline.shards.shard_set import open_parquet
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import read_bytes
from pipeline.uri import public
from pipeline.use.depth_maps import Depth, depth_map
from pipeline.use.masks import mask_ids
from pipeline.use.segment import VOID

MASKS, DEPTH = "masks", "depth"
COLUMNS = {MASKS: "mask", DEPTH: "depth"}
THREADS = 8  # that read and decode
AT_ONCE = 32  # images in memory


@dataclass(frozen=True)
class Row:
    """Where an image and its targets lie.

    Attributes:
        name: for people.
        files: of the image, then of each target; of parquet the one file.
        group: row group and row in it, of parquet.
    """

    name: str
    files: tuple[str, ...]
    group: tuple[int, int] | None = None


@dataclass(frozen=True)
class DenseSet:
    """Images with targets that were all read once, and can be.

    Attributes:
        uri: of the folder or of parquet.
        targets: MASKS, DEPTH or both; each image has all of them.
        rows: n of them.
        ids: uint8 [n, 16], of the images' bytes.
        class_ids: ids in the masks, in order, without those of no class.
        void: ids that belong to no class.
        channels: C of the images, as they were looked at.
        truth: digest of the masks or depths, as the files are.
        remarks: what was left out and why, a sentence each.
    """

    uri: str
    targets: tuple[str, ...]
    rows: tuple[Row, ...]
    ids: npt.NDArray[np.uint8]
    class_ids: tuple[int, ...] = ()
    void: tuple[int, ...] = (VOID,)
    channels: int = 3
    truth: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of the images with their targets, for the card."""
        return image_id(self.ids.tobytes() + self.truth.encode())

    def samples(
        self,
        rows: Sequence[int],
        class_ids: Sequence[int] = (),
        channels: int = 0,
        value_range: ValueRange = FULL,
    ) -> Iterator[Sample]:
        """Some of the images with their targets, decoded, in the order of `rows`.

        Args:
            rows: numbers of rows.
            class_ids: the id of each class number; default: those of this set.
            channels: C; default: as they were looked at.
            value_range: of images of more than 8 bits.

        Raises:
            DataError: a file cannot be read any more, or has not these channels.
        """
        channels = channels or self.channels
        numbers = np.full(256, VOID, np.uint8)
        numbers[list(class_ids or self.class_ids)] = np.arange(len(class_ids or self.class_ids))

        def decoded(read: tuple[int, list[bytes]]) -> Sample:
            row, (image, *targets) = read
            name = self.rows[row].name
            try:
                pixels = decode_image(image, channels, MAX_PIXELS, value_range)
            except BadImage as error:
                raise DataError(
                    f"{name} of {public(self.uri)} cannot be read with {channels} channels: "
                    f"{error.detail}",
                    "give dense images that the model takes",
                ) from error
            sample = Sample(pixels)
            for target, content in zip(self.targets, targets, strict=True):
                if target == MASKS:
                    sample.mask = numbers[mask_ids(name, content)]
                else:
                    sample.depth = depth_map(name, content)
            return sample

        with ThreadPoolExecutor(THREADS) as pool:
            for at in range(0, len(rows), AT_ONCE):
                yield from pool.map(decoded, contents(self, rows[at : at + AT_ONCE]))


@dataclass
class Sample:
    """A decoded image.

    Attributes:
        pixels: uint8 [H, W, C].
        mask: uint8 [H, W], class numbers or `VOID`; None where its set has no masks.
        depth: float32 [H, W], 0 where unknown; None where its set has no depth.
    """

    pixels: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8] | None = None
    depth: Depth | None = None


def contents(dense: DenseSet, rows: Sequence[int]) -> Iterator[tuple[int, list[bytes]]]:
    """The number of each row with its encoded image and targets; what cannot be read, or is null in
    parquet, has no bytes.
    """
    fs, _ = resolve_uri(dense.uri)
    columns = ["image", *(COLUMNS[target] for target in dense.targets)]

    @lru_cache(1)  # rows stand in the order of their row groups
    def group_of(file: str, group: int) -> list[list[memoryview]]:
        with open_parquet(fs, file, piecewise=True) as opened:
            table = opened.read_row_group(group, columns=columns)
        return [values_of(image_array(table.column(column))) for column in columns]

    for row in rows:
        place = dense.rows[row]
        if place.group is None:
            yield row, [_content(fs, file) for file in place.files]
        else:
            values = group_of(place.files[0], place.group[0])
            yield row, [bytes(column[place.group[1]]) for column in values]


def _content(fs: pafs.FileSystem, file: str) -> bytes:
    try:
        return read_bytes(fs, file)
    except StorageError:
        raise
    except OSError:
        return b""
