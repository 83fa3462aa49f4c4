"""Which images are looked at: files, folders, or a few of a set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from pipeline.errors import DataError, StorageError, one_line
from pipeline.images.bad_image import BadImage
from pipeline.images.kinds import named_as_image
from pipeline.shards.row_group import read_row_group, read_sources
from pipeline.shards.shards import ShardSet
from pipeline.storage.places import file_info, list_files, resolve_uri
from pipeline.storage.transfer import read_bytes
from pipeline.uri import public

Decode = Callable[[bytes], "np.ndarray[Any, np.dtype[np.uint8]]"]  # to [H, W, C]

MOST = 64  # images: what a page can show, and a person look at


@dataclass(frozen=True)
class File:
    """An encoded image: its name for people, whether it was named one by one, and its height and
    width in pixels once it was decoded.
    """

    name: str
    content: bytes
    named: bool = True
    size: tuple[int, int] = (0, 0)

    @property
    def digest(self) -> str:
        """Of its bytes."""
        return hashlib.blake2b(self.content, digest_size=8).hexdigest()


def read_files(places: Sequence[str], field: str) -> list[File]:
    """Image files, and those in folders of any depth, sorted by name.

    Args:
        places: paths or URIs.
        field: of the config that named them, for messages.

    Raises:
        DataError: one is not there, a folder has no images, or there are more than `MOST`.
    """
    paths: list[tuple[pafs.FileSystem, str, bool]] = []
    for place in places:
        fs, path = resolve_uri(place)
        kind = file_info(fs, path).type
        if kind == pafs.FileType.NotFound:
            raise DataError(
                f"{field}: there is no {public(place)}", "name image files or folders of images"
            )
        if kind == pafs.FileType.Directory:
            inside = [info.path for info in list_files(fs, path) if named_as_image(info.path)]
            if not inside:
                raise DataError(
                    f"{field}: no file in {public(place)} has a name of an image",
                    "name image files or folders of images",
                )
            paths += [(fs, one, False) for one in sorted(inside)]
        else:
            paths.append((fs, path, True))
    if len(paths) > MOST:
        raise DataError(
            f"{field}: {len(paths):,} images, and at most {MOST} are looked at in one go",
            "name fewer; vectors of many images are made by jobs/embed.py",
        )
    return [
        File(path.rpartition("/")[2], _content(fs, path, field), named) for fs, path, named in paths
    ]


def spread(shards: ShardSet, count: int) -> list[File]:
    """A few images of a set: those in the middle of as many equal stretches of its order.

    Packed sets are in the order of a hash of the images, so these are as good as drawn, and the
    same each time. Their names are the paths that they were packed from, where the set has those.
    """
    count = min(count, shards.rows)
    picks = (2 * np.arange(count) + 1) * shards.rows // (2 * count)
    files: list[File] = []
    first = 0
    for number, file in enumerate(shards.files):
        for group, rows in enumerate(file.row_groups):
            inside = picks[(picks >= first) & (picks < first + rows)] - first
            first += rows
            table = read_row_group(shards, number, group) if len(inside) else None
            sources = read_sources(shards.columns, file.path, group) if table else []
            for row in inside.tolist() if table else ():
                label = int(table.labels[row])  # type: ignore[union-attr]
                name = shards.class_names[label] if 0 <= label < len(shards.class_names) else ""
                image_id = bytes(table.image_ids[row]).hex()  # type: ignore[union-attr]
                content = bytes(table.images[row].as_py() or b"")  # type: ignore[union-attr]
                known_as = public(sources[row]) or f"{name} {image_id[:8]}".strip()
                files.append(File(known_as, content, named=False))
    return files


def readable(files: Sequence[File], decode: Decode, field: str) -> tuple[list[File], list[str]]:
    """The files that are images, and a sentence for each other one. No pixels are kept.

    Raises:
        DataError: a file that was named itself is no image, or none is.
    """
    good, left_out = [], []
    for file in files:
        try:
            height, width = decode(file.content).shape[:2]
        except BadImage as error:
            sentence = f"{file.name} is not read: {error.reason} ({error.detail})"
            if file.named:
                raise DataError(f"{field}: {sentence}", "name files that are images") from error
            left_out.append(sentence)
        else:
            good.append(replace(file, size=(height, width)))
    if not good:
        raise DataError(
            f"{field}: none of {len(files):,} images can be read; {left_out[0]}",
            "name files that are images",
        )
    return good, left_out


def _content(fs: pafs.FileSystem, path: str, field: str) -> bytes:
    try:
        return read_bytes(fs, path)
    except StorageError:
        raise
    except OSError as error:
        raise DataError(f"{field}: {path} cannot be read: {one_line(error)}") from error
