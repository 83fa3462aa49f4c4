"""Checkpoints: everything that a run needs to go on, written whole or not at all.

A checkpoint is a folder `checkpoints/step-00001200/` with `state.pt` (tensors, loads with
`weights_only=True`) and `meta.json` (step, what the pass has used, config, MLflow run, sizes).
`files.py` writes it so that what can be listed is complete. It holds no per-worker state:
random numbers are keyed by (seed, step, worker) and the position in the data follows from the step,
so any number of workers can read it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DamagedError, DataError, StorageError, TrainError
from pipeline.storage.places import resolve_uri
from pipeline.storage.run_folder import fingerprint
from pipeline.storage.transfer import local_copy, read_json, write_bytes_atomic
from pipeline.train.checkpoint import files
from pipeline.train.checkpoint.files import crc32, step_of
from pipeline.uri import Place, join, parent, public

log = logging.getLogger("pipeline.train")
VERSION = 4
SEEN_S = 10.0  # so long a checkpoint that another node has read may take to be seen


@dataclass(frozen=True)
class Saved:
    """A checkpoint that can be read, at a path or a URI."""

    path: Place
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done, i.e. the next step to run."""
        return int(self.meta["step"])

    def load(self) -> dict[str, Any]:
        """The tensors, on the CPU.

        Raises:
            DamagedError: other bytes are there than were written.
            OSError: it could not be read; another try may help.
        """
        with self._opened() as tensors:
            return tensors

    def teacher(self) -> dict[str, Any]:
        """The teacher's tensors alone, in memory; raises what `load` raises."""
        with self._opened(mmap=True) as tensors:
            return {name: x.clone() for name, x in tensors["teacher"].items()}

    @contextmanager
    def _opened(self, mmap: bool = False) -> Iterator[dict[str, Any]]:
        with local_copy(join(self.path, "state.pt")) as file:
            try:
                # `torch.load` compares no checksums: it would take any bytes for weights.
                if (checksum := crc32(Path(file))) != (expected := self.meta["crc32"]):
                    raise ValueError(f"its checksum is {checksum:08x} and was {expected:08x}")
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
                if (written := self.meta.get("layout")) not in (None, layout(state)):
                    raise ValueError(f"it holds other tensors than were written ({written})")
                if not isinstance(state, dict) or not isinstance(state.get("teacher", {}), dict):
                    raise ValueError("it holds no state of a run")
            except Exception as error:
                unread = isinstance(error, OSError) and error.errno != errno.EINVAL  # a bad offset
                no_memory = isinstance(error, RuntimeError) and "allocate" in str(error)
                if unread or no_memory or isinstance(error, MemoryError):
                    raise  # not of the file
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DamagedError(
                    f"checkpoint {public(self.path)} is damaged ({why})",
                    "put it back from a copy, or remove it and use an earlier one",
                ) from error
            yield state


def identity(saved: Saved) -> str:
    """Changes with a checkpoint's step, plan and bytes: what is derived from it is kept under it.

    The bytes count, for training again under the same name and plan gives other weights.
    """
    return fingerprint([saved.step, saved.meta.get("plan"), saved.meta.get("crc32")])


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


def save(folder: Place, step: int, state: dict[str, Any], meta: dict[str, Any]) -> Saved:
    """Writes a checkpoint atomically.

    Args:
        folder: the run's `checkpoints` folder.
        step: steps done.
        state: nested dicts of tensors and numbers.
        meta: JSON values; `step`, `version`, `layout`, `bytes` and `crc32` are added.

    Raises:
        OSError: where the disk is full or not writable; earlier checkpoints are untouched.
    """
    meta = {**meta, "step": step, "version": VERSION, "layout": layout(state)}
    place = join(folder, _name(step))
    return Saved(place, files.write(place, state, meta))


def checkpoints(folder: Place) -> list[Saved]:
    """The complete checkpoints of a run, oldest first; broken ones are named in a warning.

    Raises:
        TrainError: one was written by another version.
        StorageError: a remote folder cannot be read.
    """
    complete = []
    for path, read in files.entries(folder):
        try:
            complete.append(_checked(path, *read()))
        except StorageError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            why = str(error).partition("\n")[0]
            log.warning(
                "checkpoint %s is not readable (%s); using an earlier one", public(path), why
            )
    return complete


def _checked(path: Place, meta: Any, size: int) -> Saved:
    """A checkpoint whose `meta.json` says what we write there, of this folder and this file.

    Raises:
        TrainError: it was written by another version.
        ValueError: it says something else.
    """
    if not isinstance(meta, dict):
        raise ValueError("its meta.json holds no object")
    if meta.get("version") != VERSION:
        raise TrainError(
            f"checkpoint {public(path)} has version {meta.get('version')}, expected {VERSION}",
            "resume it with the raydino version that wrote it, or give the run a new name",
        )
    for name in ("step", "bytes", "crc32"):
        if type(meta.get(name)) is not int:
            raise ValueError(f"its meta.json has {name}={json.dumps(meta.get(name))[:40]}")
    if meta["step"] != step_of(parent(path)[1]):
        raise ValueError(f"its meta.json is of step {meta['step']}")
    if size != meta["bytes"]:
        raise ValueError(f"it is cut short: {size} of {meta['bytes']} bytes are there")
    return Saved(path, meta)


def at(place: Place) -> Saved | None:
    """The complete checkpoint at a place `…/step-…`, if there is one."""
    folder, name = parent(place)
    return next((s for s in checkpoints(folder) if parent(s.path)[1] == name), None)


def latest(folder: Place) -> Saved | None:
    """The newest complete checkpoint, if any."""
    complete = checkpoints(folder)
    return complete[-1] if complete else None


def restored(folder: Place) -> tuple[Saved | None, dict[str, Any]]:
    """The newest checkpoint whose tensors can be read, with them; (None, {}) without one.

    A file of the right length may still be damaged (a disk that lost its power); its checksum
    tells. Then the one before is used, and that is said.

    Raises:
        OSError: a file could not be read; another try may help.
        TrainError: there are checkpoints, and all of them are damaged.
    """
    complete = checkpoints(folder)
    for saved in reversed(complete):
        try:
            return saved, saved.load()
        except DamagedError as error:
            log.warning("%s; using an earlier one", error.what)
    if complete:
        raise TrainError(
            f"all checkpoints in {public(folder)} are damaged",
            "put one back from a copy, or remove them to begin again",
        )
    return None, {}


def restored_at(folder: Place, step: int) -> tuple[Saved, dict[str, Any]]:
    """The checkpoint of a step, with its tensors; waits some seconds for one that is not seen yet.

    Storage that nodes share may show a new folder to one of them later than to another.

    Raises:
        TrainError: it cannot be read.
    """
    end = time.monotonic() + SEEN_S
    while True:
        try:
            return _read_at(folder, step)
        except (OSError, DamagedError, ValueError, KeyError) as e:
            if time.monotonic() < end:
                time.sleep(0.5)
                continue
            why = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise TrainError(
                f"{socket.gethostname()} cannot read the checkpoint of step {step} in "
                f"{public(folder)}, from which worker 0 goes on: {why}",
                "run.folder must be storage that all nodes share and see alike",
            ) from e


def _read_at(folder: Place, step: int) -> tuple[Saved, dict[str, Any]]:
    path = join(folder, _name(step))
    meta, size = files.read_at(path)
    saved = _checked(path, meta, size)
    return saved, saved.load()


def _name(step: int) -> str:
    name = f"step-{step:08d}"
    if step_of(name) != step:
        raise TrainError(
            f"a run has at most 99,999,999 steps, not {step:,}", "set optim.steps lower"
        )
    return name


def best(folder: Place) -> tuple[Saved, float] | None:
    """The checkpoint that `mark_best` named and its score, if it is still there."""
    if (marked := _best(folder)) is not None:
        for saved in checkpoints(folder):
            if saved.step == marked[0]:
                return saved, marked[1]
    return None


def _best(folder: Place) -> tuple[int, float] | None:
    """Step and score of `best.json`; None, and a warning, where it says something else."""
    place = join(folder, "best.json")
    try:
        content = read_json(*resolve_uri(str(place)))
        if content is None:
            return None
        step, score = content["step"], content["score"]
        if type(step) is not int or type(score) not in (int, float) or not math.isfinite(score):
            raise ValueError(f"step {step!r}, score {score!r}")
    except StorageError:
        raise
    except (DataError, KeyError, TypeError, ValueError) as error:
        why = error.what if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        log.warning("%s names no checkpoint (%s); going on without it", public(place), why[:200])
        return None
    return step, float(score)


def best_of(folder: Place) -> tuple[str, str]:
    """Which images and settings the score of `best.json` is of, and what the score is called, as
    `mark_best` wrote them; or "".
    """
    content: dict[str, Any] = {}
    if _best(folder) is not None:
        content = read_json(*resolve_uri(str(join(folder, "best.json")))) or {}
    return str(content.get("compared", "")), str(content.get("name", ""))


def mark_best(folder: Place, step: int, score: float, compared: str = "", name: str = "") -> None:
    """Points `best.json` at a step; the checkpoint of that step is then kept.

    Args:
        folder: of the checkpoints.
        step: of a checkpoint.
        score: of its evaluation.
        compared: changes with the images and settings of evaluations: scores of others are unlike.
        name: of the score; another one is not compared with it.
    """
    content = {"step": step, "score": score, "compared": compared, "name": name}
    text = json.dumps(content, indent=1) + "\n"
    write_bytes_atomic(text.encode(), *resolve_uri(str(join(folder, "best.json"))))


def prune(folder: Place, keep_last: int, protected: set[int]) -> None:
    """Removes all but the newest `keep_last` checkpoints and those of `protected` steps."""
    if marked := _best(folder):
        protected = protected | {marked[0]}
    for saved in checkpoints(folder)[:-keep_last]:
        if saved.step not in protected:
            files.remove(saved.path)
    files.sweep(folder)
