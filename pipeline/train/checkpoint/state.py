"""Checkpoints: everything that a run needs to go on, written whole or not at all.

A checkpoint is a folder `checkpoints/step-00001200/`: `rank-00000.safetensors` with tensors, one
such file from each rank that wrote, `index.json` (which tensor lies where) and `meta.json` (step,
what the pass has used, config, MLflow run, sizes and checksums). `files.py` writes it so that what
can be listed is complete. It holds no per-worker state: random numbers are keyed by (seed, step,
worker), the position in the data follows from the step, and tensors go by their names. So any
number of workers can read it, whether they hold whole networks or slices. Nothing in it is pickled.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DamagedError, StorageError, TrainError
from pipeline.model.low_rank import merged_state
from pipeline.storage.run_folder import fingerprint
from pipeline.train.checkpoint import files, version4
from pipeline.train.checkpoint.best import Best, read_best
from pipeline.train.checkpoint.files import step_of
from pipeline.train.checkpoint.names import nested
from pipeline.train.checkpoint.reader import Reader, read_whole
from pipeline.train.checkpoint.writer import INDEX, write_alone
from pipeline.uri import Place, join, parent, public

log = logging.getLogger("pipeline.train")
VERSION = 5
EARLIER = 4  # the one before, which is read as well


@dataclass(frozen=True)
class Saved:
    """A checkpoint that can be read, at a path or a URI."""

    path: Place
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done, i.e. the next step to run."""
        return int(self.meta["step"])

    @property
    def earlier(self) -> bool:
        """Whether it is of the version before this one."""
        return bool(self.meta["version"] == EARLIER)

    def load(self, *parts: str) -> dict[str, Any]:
        """The state as nested dicts, tensors whole and on the CPU.

        Args:
            parts: first names, e.g. `teacher`, to read no others; all without any.

        Raises:
            DamagedError: other bytes are there than were written.
            OSError: it could not be read; another try may help.
        """
        with self.readable():
            if self.earlier:
                return version4.read(self.path, self.meta, parts)
            reader = self.reader()
            try:
                numbers = {
                    name: value
                    for name, value in self.meta.get("numbers", {}).items()
                    if not parts or name.startswith(tuple(f"{part}/" for part in parts))
                }
                return nested(read_whole(reader, parts) | numbers)
            finally:
                reader.close()

    def teacher(self) -> dict[str, Any]:
        """The teacher's tensors alone, in memory, with low-rank updates in the weights that they
        are of; raises what `load` raises.
        """
        return dict(merged_state(self.load("teacher")["teacher"]))

    def reader(self) -> Reader:
        """Reads parts of it; not of the version before."""
        return Reader(self.path, self.meta["files"])

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Around reading: what is wrong with the bytes is raised as DamagedError."""
        try:
            yield
        except Exception as error:
            unread = isinstance(error, OSError) and error.errno != errno.EINVAL  # a bad offset
            no_memory = isinstance(error, RuntimeError) and "allocate" in str(error)
            if unread or no_memory or isinstance(error, MemoryError | DamagedError):
                raise  # not of the file, or said already
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DamagedError(
                f"checkpoint {public(self.path)} is damaged ({why})",
                "put it back from a copy, or remove it and use an earlier one",
            ) from error


def identity(saved: Saved) -> str:
    """Changes with a checkpoint's step, plan and bytes: what is derived from it is kept under it.

    The bytes count, for training again under the same name and plan gives other weights.
    """
    return fingerprint([saved.step, saved.meta.get("plan"), saved.meta.get("crc32")])


def save(folder: Place, step: int, state: Mapping[str, Any], meta: dict[str, Any]) -> Saved:
    """Writes a checkpoint whole or not at all, from one process, and waits for it.

    Args:
        folder: the run's `checkpoints` folder.
        step: steps done.
        state: nested dicts of tensors and numbers, or flat ones (`names.py`).
        meta: JSON values; what else `meta.json` says is added.

    Raises:
        OSError: where the disk is full or not writable; earlier checkpoints are untouched.
    """
    place = place_of(folder, step)
    return Saved(place, write_alone(place, state, meta | {"step": step, "version": VERSION}))


def checkpoints(folder: Place) -> list[Saved]:
    """The complete checkpoints of a run, oldest first; broken ones are named in a warning.

    Raises:
        TrainError: one was written by another version.
        StorageError: a remote folder cannot be read.
    """
    complete = []
    for path, read in files.entries(folder):
        try:
            complete.append(checked(path, *read()))
        except StorageError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            if (
                isinstance(error, FileNotFoundError)
                and isinstance(path, Path)
                and not path.exists()
            ):
                continue  # removed since it was listed
            why = str(error).partition("\n")[0]
            log.warning(
                "checkpoint %s is not readable (%s); using an earlier one", public(path), why
            )
    return complete


def checked(path: Place, meta: Any, sizes: dict[str, int]) -> Saved:
    """A checkpoint whose `meta.json` says what we write there, of this folder and these files.

    Raises:
        TrainError: it was written by another version.
        ValueError: it says something else.
    """
    if not isinstance(meta, dict):
        raise ValueError("its meta.json holds no object")
    if meta.get("version") not in (VERSION, EARLIER):
        raise TrainError(
            f"checkpoint {public(path)} has version {meta.get('version')}, expected {VERSION}",
            "resume it with the raydino version that wrote it, or give the run a new name",
        )
    for name in ("step", "bytes", "crc32"):
        if type(meta.get(name)) is not int:
            raise ValueError(f"its meta.json has {name}={json.dumps(meta.get(name))[:40]}")
    if meta["step"] != step_of(parent(path)[1]):
        raise ValueError(f"its meta.json is of step {meta['step']}")
    content = {version4.FILE: meta} if meta["version"] == EARLIER else meta.get("files")
    if meta["version"] == VERSION:
        _check_files(meta, content)
    for name, said in content.items():  # type: ignore[union-attr]
        if sizes.get(name) != said["bytes"]:
            raise ValueError(
                f"it is cut short: {sizes.get(name, 0)} of {said['bytes']} bytes "
                f"of {name} are there"
            )
    return Saved(path, meta)


def _check_files(meta: dict[str, Any], content: Any) -> None:
    if not isinstance(content, dict) or INDEX not in content:
        raise ValueError(f"its meta.json has files={json.dumps(content)[:40]}")
    for name, said in content.items():
        numbers = [said.get(key) for key in ("bytes", "crc32")] if isinstance(said, dict) else []
        if not files.OURS.fullmatch(name) or [type(x) for x in numbers] != [int, int]:
            raise ValueError(f"its meta.json says {json.dumps(said)[:40]} of {name[:40]}")
    if meta["crc32"] != files.checksum_of(content):
        raise ValueError("the checksum of its meta.json is another one")
    if meta["bytes"] != sum(said["bytes"] for said in content.values()):
        raise ValueError(f"its meta.json says that it has {meta['bytes']} bytes")


def at(place: Place) -> Saved | None:
    """The complete checkpoint at a place `…/step-…`, if there is one."""
    folder, name = parent(place)
    return next((s for s in checkpoints(folder) if parent(s.path)[1] == name), None)


def latest(folder: Place) -> Saved | None:
    """The newest complete checkpoint, if any."""
    complete = checkpoints(folder)
    return complete[-1] if complete else None


def place_of(folder: Place, step: int) -> Place:
    """The place of the checkpoint of a step.

    Raises:
        TrainError: a step that has no name.
    """
    name = f"step-{step:08d}"
    if step_of(name) != step:
        raise TrainError(
            f"a run has at most 99,999,999 steps, not {step:,}", "set optim.steps lower"
        )
    return join(folder, name)


def best(folder: Place) -> tuple[Saved, Best] | None:
    """The checkpoint that `best.json` names, if it is still there."""
    if (marked := read_best(folder)) is not None:
        for saved in checkpoints(folder):
            if saved.step == marked.step:
                return saved, marked
    return None


def prune(folder: Place, keep_last: int, protected: set[int]) -> None:
    """Removes all but the newest `keep_last` checkpoints and those of `protected` steps."""
    if marked := read_best(folder):
        protected = protected | {marked.step}
    for saved in checkpoints(folder)[:-keep_last]:
        if saved.step not in protected:
            files.remove(saved.path)
    files.sweep(folder)
