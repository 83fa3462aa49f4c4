"""Checkpoints: everything that a run needs to go on, written whole or not at all.

A checkpoint is a folder `checkpoints/step-00001200/` with `state.pt` (tensors, loads with
`weights_only=True`) and `meta.json` (step, what the pass has used, config, MLflow run, sizes).
The folder gets its name last, so one that has its name is complete. It holds no per-worker state:
random numbers are keyed by (seed, step, worker) and the position in the data follows from the step,
so any number of workers can read it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import TrainError
from pipeline.files import write_json

log = logging.getLogger("pipeline.train")
VERSION = 3


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk that can be read."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done, i.e. the next step to run."""
        return int(self.meta["step"])

    def load(self) -> dict[str, Any]:
        """The tensors, on the CPU."""
        found: dict[str, Any] = torch.load(
            self.path / "state.pt", map_location="cpu", weights_only=True
        )
        return found

    def teacher(self) -> dict[str, Any]:
        """The teacher's tensors alone; the rest is not read."""
        found: dict[str, Any] = torch.load(
            self.path / "state.pt", map_location="cpu", weights_only=True, mmap=True
        )
        return {name: x.clone() for name, x in found["teacher"].items()}


def save(folder: Path, step: int, state: dict[str, Any], meta: dict[str, Any]) -> Saved:
    """Writes a checkpoint atomically.

    Args:
        folder: the run's `checkpoints` folder.
        step: steps done.
        state: nested dicts of tensors and numbers.
        meta: JSON values; `step`, `version` and `bytes` are added.

    Raises:
        OSError: where the disk is full or not writable; earlier checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with (temporary / "state.pt").open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # how torch reports a disk that fills up midway
                raise OSError(str(error).splitlines()[0]) from error
            file.flush()
            os.fsync(file.fileno())
        size = (temporary / "state.pt").stat().st_size
        meta = {**meta, "step": step, "version": VERSION, "bytes": size}
        with (temporary / "meta.json").open("w") as text:
            json.dump(meta, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        shutil.rmtree(final, ignore_errors=True)  # the same step again, after a resume
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Saved(final, meta)


def checkpoints(folder: Path) -> list[Saved]:
    """The complete checkpoints of a run, oldest first; broken ones are named in a warning."""
    found = []
    for path in sorted(folder.glob("step-*")):
        try:
            meta = json.loads((path / "meta.json").read_text())
            size = (path / "state.pt").stat().st_size
        except (OSError, ValueError) as error:
            log.warning("checkpoint %s is not readable (%s); using an earlier one", path, error)
            continue
        if meta.get("version") != VERSION:
            raise TrainError(
                f"checkpoint {path} has version {meta.get('version')}, expected {VERSION}",
                "resume it with the raydino version that wrote it, or give the run a new name",
            )
        if size != meta["bytes"]:
            log.warning(
                "checkpoint %s is cut short (%d of %d bytes); using an earlier one",
                path,
                size,
                meta["bytes"],
            )
            continue
        found.append(Saved(path, meta))
    return found


def latest(folder: Path) -> Saved | None:
    """The newest complete checkpoint, if any."""
    found = checkpoints(folder)
    return found[-1] if found else None


def best(folder: Path) -> tuple[Saved, float] | None:
    """The checkpoint that `mark_best` named and its score, if it is still there."""
    pointer = folder / "best.json"
    if not pointer.is_file():
        return None
    found = json.loads(pointer.read_text())
    for saved in checkpoints(folder):
        if saved.step == int(found["step"]):
            return saved, float(found["score"])
    return None


def mark_best(folder: Path, step: int, score: float) -> None:
    """Points `best.json` at a step; the checkpoint of that step is then kept."""
    write_json(folder / "best.json", {"step": step, "score": score})


def prune(folder: Path, keep_last: int, protected: set[int]) -> None:
    """Removes all but the newest `keep_last` checkpoints and those of `protected` steps."""
    pointer = folder / "best.json"
    if pointer.is_file():
        protected = protected | {int(json.loads(pointer.read_text())["step"])}
    for saved in checkpoints(folder)[:-keep_last]:
        if saved.step not in protected:
            # Out of the list in one move first: a kill must not leave half a checkpoint in it.
            removed = saved.path.with_name(f".{saved.path.name}.removed")
            saved.path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
