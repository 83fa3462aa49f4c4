"""Opens a set of images with masks or depth, and checks it before any model runs.

A folder has `images/`, and `masks/` or `depth/` or both, with files of the same name but for the
ending. Parquet has the columns `image`, and `mask` or `depth` or both, as the hub stores pictures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from pipeline.card.dense.sets import (
    AT_ONCE,
    COLUMNS,
    DEPTH,
    MASKS,
    THREADS,
    DenseSet,
    Row,
    contents,
)
from pipeline.errors import DataError, PipelineError, StorageError
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import decode_image
from pipeline.images.kinds import named_as_image
from pipeline.shards.columns import image_id, is_image_type
from pipeline.shards.shard_set import open_parquet
from pipeline.storage.places import absolute_uri, file_info, list_files, list_parquet, resolve_uri
from pipeline.uri import public
from pipeline.use.depth_maps import depth_map
from pipeline.use.masks import WHITE, mask_ids
from pipeline.use.segment import VOID

NAMED = 3  # files that are named where some are left out
EXPECTED = (
    "give a folder with images/ and masks/ or depth/ of the same names, or parquet with the "
    "columns image and mask or depth"
)


def open_dense_set(
    uri: str,
    field: str = "evaluate.dense",
    void: Sequence[int] = (VOID,),
    channels: int = 3,
) -> DenseSet:
    """Finds the images of a set and reads each once: what is damaged, has no partner or another
    size is left out and said.

    Where all masks are black and white (ids 0 and 255), white is a class, as in a look at images.

    Args:
        uri: path or URI.
        field: of the config that named it, for messages.
        void: ids in masks that belong to no class.
        channels: C of the images.

    Raises:
        DataError: there is no such set, or no image of it can be used.
    """
    uri = absolute_uri(uri)
    fs, path = resolve_uri(uri)
    listed = _Listed()
    folders = {info.base_name for info in _folders(fs, path)}
    if "images" in folders:
        targets = tuple(t for t in (MASKS, DEPTH) if t in folders)
        if not targets:
            raise DataError(f"{field}: {public(uri)} has no folder masks or depth", EXPECTED)
        listed.folder(fs, path, targets)
    else:
        targets = listed.parquet(fs, path, uri, field)
    none = np.zeros((0, 16), np.uint8)
    listing = DenseSet(uri, targets, tuple(listed.rows), none, channels=channels)
    looks: list[_Look] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for at in range(0, len(listing.rows), AT_ONCE):
            numbers = range(at, min(at + AT_ONCE, len(listing.rows)))
            looks += pool.map(lambda read: _looked(listing, *read), contents(listing, numbers))
    present = set().union(*(look.present for look in looks if not look.problem))
    remarks, voids = [], set(void)
    if MASKS in targets and voids == {VOID} and present == {0, WHITE}:
        voids = set()
        remarks.append(f"{public(uri)}: masks are black and white, so that white is a class")
    kept = []
    for number, look in enumerate(looks):
        if not look.problem and MASKS in targets and look.present <= voids:
            look.problem = "all pixels of the mask are void"
        if look.problem:
            listed.left_out[look.problem].append(listing.rows[number].name)
        else:
            kept.append(number)
    remarks += listed.remarks(public(uri))
    if not kept:
        raise DataError(
            f"{field}: no image of {public(uri)} can be used"
            + (f": {'; '.join(listed.reasons())}" if listed.left_out else ""),
            EXPECTED,
        )
    return DenseSet(
        uri=uri,
        targets=targets,
        rows=tuple(listing.rows[number] for number in kept),
        ids=np.stack([np.frombuffer(looks[number].digest, np.uint8) for number in kept]),
        class_ids=tuple(sorted(set().union(*(looks[n].present for n in kept)) - voids)),
        void=tuple(sorted(voids)),
        channels=channels,
        truth=image_id(b"".join(looks[number].truth for number in kept)),
        remarks=tuple(remarks),
    )


def looks_dense(uri: str) -> bool:
    """Whether a folder has images/ with masks/ or depth/ beside it; no file is opened."""
    fs, path = resolve_uri(absolute_uri(uri))
    folders = {info.base_name for info in _folders(fs, path)}
    return "images" in folders and bool(folders & {MASKS, DEPTH})


@dataclass
class _Listed:
    """Rows that have all they need by name, and names of those that have not, by reason."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def folder(self, fs: pafs.FileSystem, path: str, targets: Sequence[str]) -> None:
        names = ("images", *targets)
        stems = {name: self._stems(fs, f"{path}/{name}") for name in names}
        for stem in sorted(set().union(*stems.values())):
            missing = [name for name in names if stem not in stems[name]]
            if not missing:
                self.rows.append(Row(stem, tuple(stems[name][stem] for name in names)))
            elif "images" in missing:
                self.left_out["no file in images/ of the same name"].append(stem)
            else:
                self.left_out[f"no file in {missing[0]}/ of the same name"].append(stem)

    def _stems(self, fs: pafs.FileSystem, folder: str) -> dict[str, str]:
        stems: dict[str, str] = {}
        for info in sorted(list_files(fs, folder), key=lambda info: str(info.path)):
            relative = info.path[len(folder) + 1 :]
            if not named_as_image(info.path) or any(x.startswith(".") for x in relative.split("/")):
                continue
            stem = relative.rpartition(".")[0]
            if stem in stems:
                self.left_out["a second file of the same name"].append(relative)
            else:
                stems[stem] = info.path
        return stems

    def parquet(self, fs: pafs.FileSystem, path: str, uri: str, field: str) -> tuple[str, ...]:
        targets: tuple[str, ...] = ()
        try:
            files = [info.path for info in list_parquet(fs, path, uri, field)]
        except StorageError:
            raise
        except DataError as error:
            raise DataError(f"{field}: {error.what}", EXPECTED) from error
        for file in files:
            with open_parquet(fs, file) as opened:
                schema = opened.schema_arrow
                here = tuple(t for t, column in COLUMNS.items() if _pictures(schema, column))
                if not _pictures(schema, "image") or not here or (targets and here != targets):
                    raise DataError(
                        f"{field}: {file.rpartition('/')[2]} has the columns "
                        f"{', '.join(schema.names)}, expected pictures in image and "
                        f"{' and '.join(COLUMNS[t] for t in targets) or 'mask or depth'}",
                        EXPECTED,
                    )
                targets = here
                for group in range(opened.metadata.num_row_groups):
                    for row in range(opened.metadata.row_group(group).num_rows):
                        name = f"{file.rpartition('/')[2]}:{group}:{row}"
                        self.rows.append(Row(name, (file,), (group, row)))
        return targets

    def reasons(self) -> list[str]:
        return [
            f"{len(names):,} left out: {why} ({_shown(names)})"
            for why, names in self.left_out.items()
        ]

    def remarks(self, name: str) -> list[str]:
        return [f"{name}: {reason}" for reason in self.reasons()]


def _folders(fs: pafs.FileSystem, path: str) -> list[pafs.FileInfo]:
    if file_info(fs, path).type != pafs.FileType.Directory:
        return []
    inside = list_files(fs, path, recursive=False, folders=True)
    return [info for info in inside if info.type == pafs.FileType.Directory]


def _pictures(schema: pa.Schema, column: str) -> bool:
    return column in schema.names and is_image_type(schema.field(column).type)


@dataclass
class _Look:
    """What was seen of a row: why it cannot be used, digests of its files, ids in its mask."""

    problem: str = ""
    digest: bytes = b""
    truth: bytes = b""
    present: set[int] = field(default_factory=set)


def _looked(dense: DenseSet, row: int, encoded: list[bytes]) -> _Look:
    """Reads all of an image as it will be read for a model."""
    name, (image, *targets) = dense.rows[row].name, encoded
    look = _Look(digest=bytes.fromhex(image_id(image)))
    look.truth = b"".join(bytes.fromhex(image_id(one)) for one in targets)
    if empty := [one for one, content in zip(("image", *dense.targets), encoded, strict=True)
                 if not content]:  # fmt: skip
        look.problem = f"its {COLUMNS.get(empty[0], empty[0])} is empty or cannot be read"
        return look
    try:
        height, width = decode_image(image, dense.channels).shape[:2]
        for target, content in zip(dense.targets, targets, strict=True):
            if target == MASKS:
                values: np.ndarray[Any, Any] = mask_ids(name, content)
                look.present = {int(one) for one in np.unique(values)}
            else:
                values = depth_map(name, content)
            if values.shape != (height, width):
                look.problem = f"another size of image and {COLUMNS[target]}"
            elif target == DEPTH and not values.any():
                look.problem = "all pixels of the depth are unknown"
    except BadImage as error:
        look.problem = f"the image cannot be read ({error.reason})"
    except PipelineError:
        look.problem = f"the {COLUMNS[target]} cannot be read"
    return look


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
