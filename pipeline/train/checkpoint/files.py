"""The two files of a checkpoint, on a disk or at a URI: written, listed and removed whole.

On a disk a folder with both of them gets its name last. At a URI nothing can be renamed: each
object appears whole or not at all, but two of them do not appear together. So `state.pt` goes
first and `meta.json` last, what has a `meta.json` is complete, and it is removed first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.storage.places import delete_file, list_files, resolve_uri
from pipeline.storage.transfer import read_bytes, upload, write_bytes_atomic
from pipeline.uri import Place, is_uri, join, parent

PART = 2**24  # bytes that a sum is taken of at once
FILES = ("meta.json", "state.pt")  # of a checkpoint, in the order in which they are removed

# Reads a checkpoint's meta.json; gives it and the bytes of its state.pt.
Entry = Callable[[], tuple[dict[str, Any], int]]


def step_of(name: str) -> int | None:
    """The step of a checkpoint by the name of its folder; None for names that we do not write."""
    match = re.fullmatch(r"step-([0-9]{8})", name)
    return int(match[1]) if match else None


def crc32(file: Path) -> int:
    """The checksum of a whole file, which `meta.json` has beside its length."""
    checksum = 0
    with file.open("rb") as opened:
        while part := opened.read(PART):
            checksum = zlib.crc32(part, checksum)
    return checksum


def write(place: Place, state: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """Writes a checkpoint at its place `…/step-…`, whole or not at all.

    Returns:
        `meta` as it was written: with the length and the checksum of the tensors.

    Raises:
        OSError: where the disk is full or not writable; earlier checkpoints are untouched.
    """
    if is_uri(place):
        return _upload(str(place), state, meta)
    final = Path(place)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = (final.with_name(f".{final.name}.{end}") for end in ("tmp", "removed"))
    _discard(temporary)
    temporary.mkdir(exist_ok=True)
    try:
        meta = meta | _write_state(temporary / "state.pt", state)
        with (temporary / "meta.json").open("w") as text:
            json.dump(meta, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        if final.exists():  # the same step again, after a resume
            _discard(aside)
            final.rename(aside)
        temporary.rename(final)
        _discard(aside, final)
    finally:
        _discard(temporary)
    return meta


def _upload(checkpoint: str, state: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    fs, path = resolve_uri(checkpoint)
    with tempfile.TemporaryDirectory(prefix="raydino-") as here:
        file = Path(here) / "state.pt"
        meta = meta | _write_state(file, state)
        delete_file(fs, f"{path}/meta.json")  # the same step again, after a resume
        upload(file, fs, f"{path}/state.pt")
        write_bytes_atomic(json.dumps(meta, indent=1).encode(), fs, f"{path}/meta.json")
    return meta


def _write_state(path: Path, state: dict[str, Any]) -> dict[str, int]:
    """Writes and flushes the tensors; gives the file's length and checksum."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # how torch reports a disk that fills up midway
            raise OSError(str(error).splitlines()[0]) from error
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "crc32": crc32(path)}


def entries(folder: Place) -> Iterator[tuple[Place, Entry]]:
    """The checkpoints in a folder, oldest first. What has no `meta.json` at a URI is none: its
    upload was cut short, or it is being removed.
    """
    if not is_uri(folder):
        for path in sorted(Path(folder).glob("step-*")):
            # A folder with neither file may hold what somebody has put beside a checkpoint.
            if step_of(path.name) is not None and any((path / file).exists() for file in FILES):
                yield path, functools.partial(_read_local, path)
        return
    fs, root = resolve_uri(str(folder))

    def read(name: str, size: int) -> tuple[dict[str, Any], int]:
        meta: dict[str, Any] = json.loads(read_bytes(fs, f"{root}/{name}/meta.json"))
        return meta, size

    for name, files in sorted(_listed(str(folder)).items()):
        if "meta.json" in files:
            size = files.get("state.pt", 0)
            yield str(join(folder, name)), functools.partial(read, name, size)


def read_at(place: Place) -> tuple[dict[str, Any], int]:
    """The `meta.json` of the checkpoint at a place and the bytes of its `state.pt`.

    Raises:
        OSError: it is not there.
    """
    if not is_uri(place):  # by its name: a listing may be an old one
        return _read_local(Path(place))
    listed = dict(entries(parent(place)[0]))
    if place not in listed:
        raise OSError("it is not there")
    return listed[place]()


def _read_local(path: Path) -> tuple[dict[str, Any], int]:
    return json.loads((path / "meta.json").read_text()), (path / "state.pt").stat().st_size


def _listed(folder: str) -> dict[str, dict[str, int]]:
    """Files and their bytes by checkpoint."""
    fs, root = resolve_uri(folder)
    files: dict[str, dict[str, int]] = {}
    for info in list_files(fs, root):
        name, _, file = str(info.path)[len(root) :].lstrip("/").partition("/")
        if step_of(name) is not None:
            files.setdefault(name, {})[file] = info.size
    return files


def remove(place: Place) -> None:
    """Removes a checkpoint; a kill in between leaves nothing that is taken for one."""
    if is_uri(place):
        fs, path = resolve_uri(str(place))
        for file in FILES:
            delete_file(fs, f"{path}/{file}")
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
    """Removes what uploads that were cut short have left. For the one who writes checkpoints."""
    if not is_uri(folder):
        return
    for name, files in _listed(str(folder)).items():
        if "meta.json" not in files and "state.pt" in files:
            remove(join(folder, name))


def _discard(folder: Path, heir: Path | None = None) -> None:
    """Deletes a checkpoint's own files and its folder. What others have put there moves to `heir`;
    without one the folder stays with it.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for file in FILES:
        (folder / file).unlink(missing_ok=True)
    if heir is not None:
        for other in folder.iterdir():
            other.rename(heir / other.name)
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()
