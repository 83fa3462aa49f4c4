"""What a run folder knows about MLflow: run ids, how much of the journal is there, who sends it."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.track.pages.zeros import Zeros

FILE_NAME = "track.json"


@dataclass
class Known:
    """One MLflow server: the ids it gave us, the journal bytes that it acknowledged, and which
    zeros of them are held back, by run.
    """

    uri: str = ""
    experiment_id: str = ""
    runs: dict[str, str] = field(default_factory=dict)
    sent: int = 0
    zeros: dict[str, Zeros] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Known:
        """As it stands in track.json."""
        zeros = {run: Zeros(**one) for run, one in raw.get("zeros", {}).items()}
        return cls(**{**raw, "zeros": zeros})


class State:
    """`runs/<name>/track.json`: a key that marks the folder's runs on every server, and `Known`s.

    Only the holder of the folder's lock writes it. It is keyed by server, so that a run that was
    made on one server can be sent to another one later, whole.
    """

    def __init__(self, folder: Path, key: str = "") -> None:
        self.path = folder / FILE_NAME
        self.key = key
        self.servers: dict[str, Known] = {}
        if self.path.exists():
            raw = json.loads(self.path.read_text())
            self.key = raw["key"]
            self.servers = {name: Known.of(known) for name, known in raw["servers"].items()}
        elif not key:
            self.key = uuid.uuid4().hex
        if not self.path.exists():
            self.save()

    def known(self, server: str) -> Known:
        """The entry of a server, made on first use."""
        return self.servers.setdefault(server, Known())

    def save(self) -> None:
        """Writes the file atomically. Without fsync: a lost update only sends some lines again."""
        raw = {"key": self.key, "servers": {k: asdict(v) for k, v in self.servers.items()}}
        atomic_write(self.path, json.dumps(raw, indent=1).encode())


def key_of(folder: Path) -> str:
    """The key of a run folder, or "" if it has none."""
    path = folder / FILE_NAME
    return str(json.loads(path.read_text())["key"]) if path.exists() else ""


def forget_local(folder: Path) -> None:
    """Forgets the local servers that a folder knows; for one that comes from another machine, whose
    server may have the same path there. The runs are then made again here, whole.
    """
    if not (folder / FILE_NAME).exists():
        return
    state = State(folder)
    state.servers = {k: v for k, v in state.servers.items() if not k.startswith("local:")}
    state.save()


class FolderLock:
    """One sender a folder: an flock that the kernel drops when the process dies.

    Not by filelock, as the lock of a run folder.
    """

    def __init__(self, folder: Path, name: str = ".track.lock") -> None:
        self.path = folder / name
        self._fd = -1

    def acquire(self, wait: bool = False) -> bool:
        """Takes the lock if it is free (or waits for it); True if this object holds it."""
        if self._fd >= 0:
            return True
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def release(self) -> None:
        """Gives the lock back; harmless if not held."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def atomic_write(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
