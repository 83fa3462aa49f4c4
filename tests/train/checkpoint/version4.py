"""Writes a checkpoint as version 4 did, with nothing of the code that reads it."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import torch

from pipeline.train.checkpoint.state import Saved, at


def version4_saved(
    folder: Path, step: int, tensors: dict[str, Any], meta: dict[str, Any] | None = None
) -> Saved:
    """`state.pt` by `torch.save`, and `meta.json`, in `folder / step-…`."""
    place = folder / f"step-{step:08d}"
    place.mkdir(parents=True)
    torch.save(tensors, place / "state.pt")
    content = (place / "state.pt").read_bytes()
    sizes = {"bytes": len(content), "crc32": zlib.crc32(content), "layout": layout(tensors)}
    text = json.dumps({**(meta or {}), "step": step, "version": 4, **sizes}, indent=1)
    (place / "meta.json").write_text(text)
    saved = at(place)
    assert saved is not None
    return saved


def layout(state: Any) -> str:
    """Names, shapes and types, as version 4 summed them up."""
    lines: list[str] = []

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            lines.append(f"{name} dict")
            for key, inner in value.items():
                walk(inner, f"{name}/{key}")
        elif isinstance(value, list | tuple):
            lines.append(f"{name} {len(value)}")
            for place, inner in enumerate(value):
                walk(inner, f"{name}/{place}")
        elif isinstance(value, torch.Tensor):
            lines.append(f"{name} {tuple(value.shape)} {value.dtype}")
        else:
            lines.append(f"{name} {type(value).__name__}")

    walk(state, "")
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
