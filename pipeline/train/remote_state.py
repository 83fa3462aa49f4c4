"""Checkpoints at a URI: `state.pt` first, `meta.json` last, so what has a `meta.json` is complete.

Each object appears whole or not at all, but two of them do not appear together; hence the order,
and its reverse when a checkpoint is removed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.storage.places import delete_file, list_files, resolve_uri
from pipeline.storage.transfer import read_bytes, upload, write_bytes_atomic
from pipeline.uri import join

# Reads a checkpoint's meta.json; gives it and the bytes of its state.pt.
Entry = Callable[[], tuple[dict[str, Any], int]]


def step_of(name: str) -> int | None:
    """The step of a checkpoint by the name of its folder; None for names that we do not write."""
    match = re.fullmatch(r"step-([0-9]{8})", name)
    return int(match[1]) if match else None


def save(folder: str, name: str, state: Path, meta: dict[str, Any]) -> None:
    """Uploads `state`, a local file, as the checkpoint `name`.

    Raises:
        StorageError: an upload failed for good; earlier checkpoints are untouched.
    """
    fs, path = resolve_uri(str(join(folder, name)))
    delete_file(fs, f"{path}/meta.json")  # the same step again, after a resume
    upload(state, fs, f"{path}/state.pt")
    write_bytes_atomic(json.dumps(meta, indent=1).encode(), fs, f"{path}/meta.json")


def entries(folder: str) -> Iterator[tuple[str, Entry]]:
    """The checkpoints in a folder, oldest first, by one listing. What has no `meta.json` is none:
    its upload was cut short, or it is being removed.
    """
    fs, root = resolve_uri(folder)

    def read(name: str, size: int) -> tuple[dict[str, Any], int]:
        meta: dict[str, Any] = json.loads(read_bytes(fs, f"{root}/{name}/meta.json"))
        return meta, size

    for name, files in sorted(_listed(folder).items()):
        if "meta.json" in files:
            size = files.get("state.pt", 0)
            yield str(join(folder, name)), functools.partial(read, name, size)


def sweep(folder: str) -> None:
    """Removes what uploads that were cut short have left. For the one who writes checkpoints."""
    for name, files in _listed(folder).items():
        if "meta.json" not in files and "state.pt" in files:
            remove(str(join(folder, name)))


def _listed(folder: str) -> dict[str, dict[str, int]]:
    """Files and their bytes by checkpoint."""
    fs, root = resolve_uri(folder)
    files: dict[str, dict[str, int]] = {}
    for info in list_files(fs, root):
        name, _, file = str(info.path)[len(root) :].lstrip("/").partition("/")
        if step_of(name) is not None:
            files.setdefault(name, {})[file] = info.size
    return files


def remove(checkpoint: str) -> None:
    """Removes a checkpoint; a kill in between leaves a `state.pt` that nobody takes for one."""
    fs, path = resolve_uri(checkpoint)
    delete_file(fs, f"{path}/meta.json")
    delete_file(fs, f"{path}/state.pt")
