"""Atomic writes and the run folder with its `_done.json` marks."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, PipelineError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what was written there gets the name at the end, whole.

    The file is flushed to the disk before the rename, so a crash leaves the old one or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically as indented JSON."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def fingerprint(value: Any) -> str:
    """16 hex digits of a JSON-like value: equal values give equal digits on every machine."""
    text = json.dumps(value, sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/`: plan, journal, checkpoints, weights, pictures and one folder per stage."""

    path: Path

    @classmethod
    def of(cls, folder: str, name: str) -> RunFolder:
        """The folder of a run.

        Raises:
            ConfigError: for a URI, which run folders do not support yet.
        """
        if "://" in folder and not folder.startswith("file://"):
            raise ConfigError(
                f"run.folder={folder} is a URI; expected a path that all nodes share",
                "shards may be remote, run folders not yet",
            )
        return cls((Path(folder.removeprefix("file://")) / name).absolute())

    def stage(self, name: str) -> Path:
        """The folder of a stage's own files."""
        return self.path / name

    def done(self, stage: str, key: str) -> dict[str, Any] | None:
        """The result of a finished stage with this key (hash of config and inputs), else None."""
        mark = self.stage(stage) / "_done.json"
        if not mark.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(mark.read_text())
        except ValueError:
            return None  # not ours or cut short: the stage runs again
        return found["result"] if found.get("key") == key else None

    def last(self, stage: str) -> dict[str, Any]:
        """The result of a stage when it finished last, whatever its key; empty if it never did."""
        mark = self.stage(stage) / "_done.json"
        found: dict[str, Any] = json.loads(mark.read_text())["result"] if mark.is_file() else {}
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other job on this machine works in the folder.

        Raises:
            PipelineError: where one does already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".job.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PipelineError(
                    f"another job is working in {self.path}",
                    "wait until it ends, or give this one another run.name",
                ) from None
            yield

    def mark_done(self, stage: str, key: str, result: dict[str, Any]) -> None:
        """Says that a stage is finished; a rerun with the same key does nothing."""
        write_json(self.stage(stage) / "_done.json", {"key": key, "result": result})
