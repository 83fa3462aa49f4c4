"""Checkpoints as they were before version 5: one `state.pt` of nested dicts, by `torch.save`.

They are read, with `weights_only=True`, and never written. States of the optimizer lay there by
number; the groups of its parameters name them.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.storage.transfer import local_copy
from pipeline.uri import Place, join

PART = 2**24  # bytes that a sum is taken of at once
FILE = "state.pt"


def crc32(file: Path) -> int:
    """The checksum of a whole file, which `meta.json` has beside its length."""
    checksum = 0
    with file.open("rb") as opened:
        while part := opened.read(PART):
            checksum = zlib.crc32(part, checksum)
    return checksum


def read(place: Place, meta: dict[str, Any], parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tensors of a checkpoint, on the host, named as in version 5.

    Args:
        place: of the checkpoint.
        meta: its `meta.json`.
        parts: first names, e.g. `teacher`; all without any.

    Raises:
        OSError: it could not be read; another try may help.
        Exception: of any kind, where it is damaged.
    """
    with local_copy(join(place, FILE)) as file:
        # `torch.load` compares no checksums: it would take any bytes for weights.
        if (checksum := crc32(Path(file))) != (expected := meta["crc32"]):
            raise ValueError(f"its checksum is {checksum:08x} and was {expected:08x}")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=bool(parts))
        if (written := meta.get("layout")) not in (None, layout(state)):
            raise ValueError(f"it holds other tensors than were written ({written})")
        if not isinstance(state, dict) or not isinstance(state.get("teacher", {}), dict):
            raise ValueError("it holds no state of a run")
        if parts:
            return {part: _copied(state[part]) for part in parts if part in state}
    if isinstance(optimizer := state.get("optimizer"), dict) and "param_groups" in optimizer:
        state["optimizer"] = by_name(optimizer)
    return state


def _copied(value: Any) -> Any:
    """In memory: what is mapped from a file goes with it."""
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def by_name(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer by the names of its parameters, which its groups have."""
    names = {
        number: name
        for group in optimizer["param_groups"]
        for number, name in zip(group["params"], group["names"], strict=True)
    }
    return {names[number]: state for number, state in optimizer["state"].items()}


def layout(state: Any) -> str:
    """16 hex digits of the names, shapes and types in a state, whatever the values."""

    def lines(value: Any, name: str) -> Iterator[str]:
        if isinstance(value, dict):
            yield f"{name} dict"
            for key, inner in value.items():
                yield from lines(inner, f"{name}/{key}")
        elif isinstance(value, list | tuple):
            yield f"{name} {len(value)}"
            for place, inner in enumerate(value):
                yield from lines(inner, f"{name}/{place}")
        elif isinstance(value, torch.Tensor):
            yield f"{name} {tuple(value.shape)} {value.dtype}"
        else:
            yield f"{name} {type(value).__name__}"

    return hashlib.blake2b("\n".join(lines(state, "")).encode(), digest_size=8).hexdigest()
