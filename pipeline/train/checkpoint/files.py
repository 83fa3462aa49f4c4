"""The files of a checkpoint, on a disk or at a URI: written, listed and removed whole.

On a disk a folder with all of them gets its name last. At a URI nothing can be renamed: each
object appears whole or not at all, but several of them do not appear together. So `meta.json` goes
last, what has a `meta.json` is complete, and it is removed first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.storage.places import delete_file, list_files, resolve_uri
from pipeline.storage.transfer import read_bytes, upload, write_bytes_atomic
from pipeline.uri import Place, is_uri, join, parent

META = "meta.json"
# What we write into the folder of a checkpoint: of version 5, and `state.pt` of earlier ones.
OURS = re.compile(r"meta\.json|index\.json|state\.pt|rank-[0-9]{5}\.safetensors")
UNFINISHED = re.compile(r"\.step-[0-9]{8}\.(tmp|removed)")  # on a disk, on its way in or out

# Reads a checkpoint's meta.json; gives it and the bytes of its other files of ours.
Entry = Callable[[], tuple[dict[str, Any], dict[str, int]]]


def step_of(name: str) -> int | None:
    """The step of a checkpoint by the name of its folder; None for names that we do not write."""
    match = re.fullmatch(r"step-([0-9]{8})", name)
    return int(match[1]) if match else None


def checksum(content: bytes) -> int:
    """CRC-32 of bytes."""
    return zlib.crc32(content)


def checksum_of(content: Mapping[str, Any]) -> int:
    """One checksum for the files of a checkpoint, from what is said of each."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


# ---- Writing: `begin`, `write` as often as there are files, `complete`; or `abandon`.


def begin(place: Place) -> None:
    """Makes room for a checkpoint. Where there is one of this step, after a resume: on a disk it
    stays until `complete`; at a URI it is none from here on.

    Raises:
        OSError: not writable.
    """
    if is_uri(place):
        remove(place)
        return
    temporary = _temporary(place)
    _discard(temporary)
    temporary.mkdir(parents=True, exist_ok=True)


def write(place: Place, name: str, fill: Callable[[Path], None]) -> int:
    """Writes a file of a checkpoint that has begun; any rank may.

    Args:
        place: of the checkpoint, `…/step-…`.
        name: of the file.
        fill: writes it at a path, and waits for the disk.

    Returns:
        Its bytes.

    Raises:
        OSError: where the disk is full or not writable.
    """
    if not is_uri(place):
        folder = _temporary(place)
        folder.mkdir(parents=True, exist_ok=True)  # another node may not see it yet
        fill(folder / name)
        return (folder / name).stat().st_size
    fs, path = resolve_uri(str(place))
    with tempfile.TemporaryDirectory(prefix="raydino-") as here:
        file = Path(here) / name
        fill(file)
        upload(file, fs, f"{path}/{name}")
        return file.stat().st_size


def write_text(place: Place, name: str, content: bytes) -> None:
    """Writes a small file of a checkpoint that has begun."""

    def fill(path: Path) -> None:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    write(place, name, fill)


def complete(place: Place, meta: bytes) -> None:
    """Writes `meta.json`; from here on the checkpoint is listed."""
    if is_uri(place):
        fs, path = resolve_uri(str(place))
        write_bytes_atomic(meta, fs, f"{path}/{META}")
        return
    final, temporary = Path(place), _temporary(place)
    write_text(place, META, meta)
    aside = final.with_name(f".{final.name}.removed")
    if final.exists():  # the same step again, after a resume
        _discard(aside)
        final.rename(aside)
    temporary.rename(final)
    _discard(aside, final)


def abandon(place: Place) -> None:
    """Removes what a write that failed has left on a disk. At a URI `sweep` does."""
    if not is_uri(place):
        _discard(_temporary(place))


def _temporary(place: Place) -> Path:
    final = Path(place)
    return final.with_name(f".{final.name}.tmp")


# ---- Reading and listing.


def read(place: Place, name: str) -> bytes:
    """A small file of a checkpoint.

    Raises:
        OSError: it could not be read.
    """
    return read_bytes(*resolve_uri(str(join(place, name))))


def entries(folder: Place) -> Iterator[tuple[Place, Entry]]:
    """The checkpoints in a folder, oldest first. What has no `meta.json` at a URI is none: its
    upload was cut short, or it is being removed.
    """
    if not is_uri(folder):
        for path in sorted(Path(folder).glob("step-*")):
            # A folder without any may hold what somebody has put beside a checkpoint.
            if step_of(path.name) is not None and _ours(path):
                yield path, functools.partial(_read_local, path)
        return
    fs, root = resolve_uri(str(folder))

    def read(name: str, sizes: dict[str, int]) -> tuple[dict[str, Any], dict[str, int]]:
        meta: dict[str, Any] = json.loads(read_bytes(fs, f"{root}/{name}/{META}"))
        return meta, sizes

    for name, sizes in sorted(_listed(str(folder)).items()):
        if META in sizes:
            yield str(join(folder, name)), functools.partial(read, name, sizes)


def read_at(place: Place) -> tuple[dict[str, Any], dict[str, int]]:
    """The `meta.json` of the checkpoint at a place, and the bytes of its files.

    Raises:
        OSError: it is not there.
    """
    if not is_uri(place):  # by its name: a listing may be an old one
        return _read_local(Path(place))
    listed = dict(entries(parent(place)[0]))
    if place not in listed:
        raise OSError("it is not there")
    return listed[place]()


def _ours(folder: Path) -> list[Path]:
    """Our files in the folder of a checkpoint, `meta.json` first."""
    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if OURS.fullmatch(path.name)]
    return sorted(files, key=lambda path: (path.name != META, path.name))


def _read_local(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    meta = json.loads((path / META).read_text())
    return meta, {file.name: file.stat().st_size for file in _ours(path)}


def _listed(folder: str) -> dict[str, dict[str, int]]:
    """Files and their bytes by checkpoint."""
    fs, root = resolve_uri(folder)
    sizes: dict[str, dict[str, int]] = {}
    for info in list_files(fs, root):
        name, _, file = str(info.path)[len(root) :].lstrip("/").partition("/")
        if step_of(name) is not None:
            sizes.setdefault(name, {})[file] = info.size
    return sizes


# ---- Removing.


def remove(place: Place) -> None:
    """Removes a checkpoint; a kill in between leaves nothing that is taken for one."""
    if is_uri(place):
        fs, path = resolve_uri(str(place))
        names = [info.base_name for info in list_files(fs, path, recursive=False)]
        for name in sorted(names, key=lambda name: (name != META, name)):
            if OURS.fullmatch(name):
                delete_file(fs, f"{path}/{name}")
        return
    local = Path(place)
    if local.is_symlink():  # somebody keeps it elsewhere
        return
    # Out of the list in one move first: a kill must not leave half a checkpoint in it.
    removed = local.with_name(f".{local.name}.removed")
    _discard(removed)
    local.rename(removed)
    _discard(removed)
    if removed.exists():  # with files of others
        removed.rename(local)


def sweep(folder: Place) -> None:
    """Removes what writes that were cut short have left. For the one who writes checkpoints, when
    none is being written.
    """
    if not is_uri(folder):
        for path in Path(folder).glob(".step-*"):  # by a kill, in the middle of a write or a move
            if UNFINISHED.fullmatch(path.name):
                _discard(path)
        return
    for name, sizes in _listed(str(folder)).items():
        if META not in sizes and any(OURS.fullmatch(file) for file in sizes):
            remove(join(folder, name))


def _discard(folder: Path, heir: Path | None = None) -> None:
    """Deletes a checkpoint's own files and its folder. What others have put there moves to `heir`;
    without one the folder stays with it.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for file in _ours(folder):
        file.unlink(missing_ok=True)
    if heir is not None:
        for other in folder.iterdir():
            other.rename(heir / other.name)
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()
