"""Atomic writes and the run folder with its `_done.json` marks."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from pipeline.environment import has_home
from pipeline.errors import PipelineError
from pipeline.uri import Place, is_uri, join, public

log = logging.getLogger("pipeline")
DONE = "_done.json"  # in the folder of a stage that is finished


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; what was written there gets the name at the end, whole.

    The file is flushed to the disk before the rename, so a crash leaves the old one or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # random, since processes of several nodes may have the same number
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
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


def home() -> Path:
    """Where working copies of remote run folders are: `RAYDINO_HOME`, else ~/.cache/raydino.

    Raises:
        PipelineError: this user has no home that can be written.
    """
    if chosen := os.environ.get("RAYDINO_HOME"):
        return Path(chosen).expanduser().absolute()
    if not has_home():
        raise PipelineError(
            "a run folder at a URI needs a place for its working copy, and this user has no home "
            "that can be written",
            "set RAYDINO_HOME to a folder on this machine",
        )
    return Path("~/.cache/raydino").expanduser().absolute()


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/`: plan, journal, checkpoints, weights, pictures and one folder per stage.

    Attributes:
        path: where the job works; the run folder itself, or a working copy of the one at `uri`.
        uri: of the run folder, if it is remote. `mirror` keeps the small files in step; what is
            large or written by other nodes (`at`) is read and written there.
    """

    path: Path
    uri: str = ""

    @classmethod
    def of(cls, folder: str, name: str) -> RunFolder:
        """The folder of a run: a path, or a URI that pyarrow opens.

        Raises:
            PipelineError: the name does not stay inside of the folder, or is no name for a file.
        """
        if why := _not_a_name(name, is_uri(folder)):
            shown = ascii(name) if len(name) <= 60 else f"{name[:50]!a}…"
            raise PipelineError(
                f"run.name={shown} {why}",
                "take a short name of letters, digits, - and _; run.folder says where it lies",
            )
        if is_uri(folder) and not folder.startswith("file://"):
            uri = str(join(folder, name))
            return cls(home() / "runs" / fingerprint(public(folder)) / name, uri)
        return cls((Path(folder.removeprefix("file://")) / name).absolute())

    def at(self, *names: str) -> Place:
        """A place in the folder that all nodes reach."""
        return join(self.uri or self.path, *names)

    @property
    def checkpoints(self) -> Place:
        """Where the checkpoints are."""
        return self.at("checkpoints")

    def __str__(self) -> str:
        return public(self.uri or self.path)

    def stage(self, name: str) -> Path:
        """The folder of a stage's own files."""
        return self.path / name

    def done(self, stage: str, key: str) -> dict[str, Any] | None:
        """The result of a finished stage with this key (hash of config and inputs), else None."""
        mark = self._mark(stage)
        return mark["result"] if mark and mark.get("key") == key else None

    def last(self, stage: str) -> dict[str, Any]:
        """The result of a stage when it finished last, whatever its key; empty if it never did."""
        mark = self._mark(stage)
        return mark["result"] if mark else {}

    def _mark(self, stage: str) -> dict[str, Any]:
        """What a stage's mark says; nothing where it is not ours or cut short."""
        try:
            content = json.loads((self.stage(stage) / DONE).read_text())
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return {}
        except (ValueError, RecursionError):
            return {}
        whole = isinstance(content, dict) and isinstance(content.get("result"), dict)
        return content if whole else {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other job on this machine works in the folder.

        Not by filelock: before version 4 it empties what has the lock's name, and since then, on a
        disk without locks (some NFS), it leaves a marker, which outlives a job killed elsewhere.

        Raises:
            PipelineError: where one does already, or the lock is no file of ours.
        """
        with self._lock_file() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PipelineError(
                    f"another job is working in {self}",
                    "wait until it ends, or give this one another run.name",
                ) from None
            except OSError as error:  # a disk without locks
                log.warning("%s cannot be locked (%s): start no second job in it", self, error)
            yield

    def _lock_file(self) -> IO[bytes]:
        """The lock, never through a link and never emptied: what it holds may be someone's.

        Raises:
            PipelineError: the folder cannot be made or written, or the lock is no file.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PipelineError(
                f"the run folder {self} cannot be made: {error.strerror}",
                "set run.folder to a folder that this user may write in, and run.name to a name "
                "that is free there",
            ) from error
        lock = self.path / ".job.lock"
        try:
            number = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise PipelineError(
                f"{lock} cannot be locked: {error.strerror}",
                "take that file, folder or link away, or give the run another run.folder, where "
                "this user may write",
            ) from error
        return os.fdopen(number, "r+b")

    def mark_done(self, stage: str, key: str, result: dict[str, Any]) -> None:
        """Says that a stage is finished; a rerun with the same key does nothing."""
        write_json(self.stage(stage) / DONE, {"key": key, "result": result})


def _not_a_name(name: str, remote: bool) -> str:
    """Why a run cannot have this name; empty where it can."""
    parts = name.split("/")
    if not name.strip():
        return "is empty"
    if not name.isprintable() or name != name.strip():
        return "has line ends, control characters or blanks around it"
    if name.startswith(("/", "~")):
        return "is a path, not a name inside of run.folder"
    if not {"", ".", ".."}.isdisjoint(parts):
        return "leads out of run.folder, or has empty parts"
    if max(len(part.encode()) for part in parts) > 255:
        return "is too long: a file system takes 255 bytes"
    if remote and not {"?", "#", "%"}.isdisjoint(name):
        return "has a character that means something else in a URI"
    return ""
