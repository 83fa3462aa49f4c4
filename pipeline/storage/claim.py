"""Whose a folder of shards is while somebody writes into it.

Who wants to write leaves a claim, a file with a name of its own, and then lists the claims. So of
two who come at once at least one sees the other and goes away, on any storage that lists a file as
soon as it was written: local disks, S3, GCS and Azure do. (NFS clients may list a folder some
seconds late.) A claim goes when the folder is finished, and stays after a kill: the same owner goes
on, and everybody else is told whose the folder is.

On a local disk a claim is locked as well, so that one of a dead process is known for what it is, as
long as both processes are of one machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from pyarrow import fs as pafs

from pipeline.errors import DataError
from pipeline.storage.places import (
    delete_file,
    file_info,
    list_files,
    make_folder,
    public_uri,
    resolve_uri,
)
from pipeline.storage.transfer import read_mark, write_bytes_atomic

_NAME = re.compile(r"\.claim-[0-9a-f]{16}\.json")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def _machine() -> str:
    """Of this boot of this machine, also inside of containers: where file locks can be believed."""
    return _BOOT.read_text().strip() if _BOOT.is_file() else socket.gethostname()


@dataclass(frozen=True)
class Owner:
    """Who writes.

    Attributes:
        source: what the shards are made of. Shards of the same source may be replaced.
        work: folder of the intermediate files. The same work on the same source goes on.
    """

    source: str
    work: str


@dataclass(frozen=True)
class _Claim:
    """A claim that lies in a folder; `owner` is None where the file says nothing that we know."""

    path: str
    owner: Owner | None
    machine: str
    process: str


@dataclass
class ClaimedFolder:
    """A folder that is ours to write in until `claimed` ends.

    Attributes:
        uri: of the folder; `folder` is its path in `fs`.
        path: of the claim.
        inherited: an earlier job on the same source was stopped here, so what is not finished is
            ours.
        begun: shards may have been written, so after an error they are still claimed.
        lock: of the claim, as long as this process lives.
    """

    uri: str
    fs: pafs.FileSystem
    folder: str
    path: str = ""
    inherited: bool = False
    begun: bool = False
    lock: IO[bytes] | None = field(default=None, repr=False)

    def check(self) -> None:
        """Whether the claim is still there: to be called before anything is deleted or finished.

        Raises:
            DataError: it is gone; somebody else may be writing now.
        """
        if not any(info.path == self.path for info in _files(self.fs, self.folder)):
            raise DataError(
                f"{public_uri(self.uri)} is not this job's any more: its claim "
                f"{self.path.rpartition('/')[2]} is gone",
                hint="somebody has emptied the folder or writes there; see who, then start again.",
            )

    def _take(self, owner: Owner) -> None:
        self.path = f"{self.folder}/.claim-{os.urandom(8).hex()}.json"
        process = f"process {os.getpid()} on {socket.gethostname()}"
        content = asdict(owner) | {"machine": _machine(), "process": process}
        write_bytes_atomic(json.dumps(content, indent=1).encode(), self.fs, self.path)
        if isinstance(self.fs, pafs.LocalFileSystem):
            try:
                self.lock = Path(self.path).open("r+b")  # noqa: SIM115
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (FileNotFoundError, BlockingIOError):  # taken for one of a dead process
                self.check()
                raise DataError(
                    f"two jobs began to write into {public_uri(self.uri)} at once",
                    hint="nothing was written; start one of them again.",
                ) from None
            except OSError:  # no locks on this disk: the claim itself still tells
                self.lock = None

    def _give_back(self, keep: bool) -> None:
        if not keep and self.path:
            delete_file(self.fs, self.path)
        if self.lock is not None:
            self.lock.close()


@contextmanager
def claimed(uri: str, owner: Owner, unfinished: Callable[[], bool]) -> Iterator[ClaimedFolder]:
    """Inside, nobody else writes into the folder by these rules.

    The claim goes at the end. After an error it stays where shards of ours are not finished; after
    a kill it stays.

    Args:
        uri: of the folder; made where it is not there.
        owner: who writes.
        unfinished: whether the folder has shards and no manifest.

    Raises:
        DataError: somebody else writes there, or was stopped while writing.
    """
    fs, folder = resolve_uri(uri)
    mine = ClaimedFolder(uri, fs, folder)
    _settle(mine, owner)
    make_folder(fs, folder)
    try:
        mine._take(owner)
        _settle(mine, owner)  # who came at the same time
    except BaseException:
        mine._give_back(keep=False)
        raise
    try:
        yield mine
    except BaseException:
        keep = mine.begun
        with contextlib.suppress(OSError, DataError):
            keep = keep and unfinished()
        mine._give_back(keep)
        raise
    mine._give_back(keep=False)


def check_unclaimed(uri: str, owner: Owner) -> bool:
    """Looks whether somebody else has a claim, and changes nothing.

    Returns:
        Whether an earlier job on the same source was stopped there.

    Raises:
        DataError: as `claimed` would.
    """
    mine = ClaimedFolder(uri, *resolve_uri(uri))
    for info in _files(mine.fs, mine.folder):
        _judged(mine, info.path, owner, lambda claim: None)
    return mine.inherited


def _files(fs: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    infos = list_files(fs, folder, recursive=False)
    return [info for info in infos if _NAME.fullmatch(info.base_name)]


def _settle(mine: ClaimedFolder, owner: Owner) -> None:
    """Takes away claims of the same owner, and of dead processes that worked on the same source.

    Raises:
        DataError: another claim stands.
    """
    for info in _files(mine.fs, mine.folder):
        if info.path != mine.path:
            _judged(mine, info.path, owner, lambda other: delete_file(mine.fs, other.path))


def _judged(
    mine: ClaimedFolder, path: str, owner: Owner, replaced: Callable[[_Claim], None]
) -> None:
    """Calls `replaced` with a claim that the owner may take over; refuses another one."""
    claim = _read(mine.fs, path)
    if claim is None:
        return
    with _free(mine.fs, claim) as free:
        ours = free is not False and claim.owner == owner
        same_source = claim.owner is not None and claim.owner.source == owner.source
        if not (ours or (free is True and same_source)):
            raise _refusal(mine.uri, claim, now=free is False)
        mine.inherited |= same_source
        replaced(claim)


def _refusal(uri: str, claim: _Claim, now: bool) -> DataError:
    owner = claim.owner or Owner("an unknown source", "an unknown place")
    name = claim.path.rpartition("/")[2]
    if now:
        return DataError(
            f"another job is writing shards of {owner.source} into {public_uri(uri)} "
            f"({claim.process})",
            hint="wait until it ends, or choose another folder for these shards.",
        )
    return DataError(
        f"{public_uri(uri)} belongs to shards of {owner.source} that are not finished "
        f"({claim.process}, work in {owner.work})",
        hint="choose another folder for these shards, or finish those first by the same command as "
        f"before; if nobody wants them any more, delete that folder (or {name} alone).",
    )


def _read(fs: pafs.FileSystem, path: str) -> _Claim | None:
    """A claim; None where it is gone meanwhile."""
    if not file_info(fs, path).is_file:
        return None
    values = read_mark(fs, path)
    texts = {k: str(values.get(k, "")) for k in ("source", "work", "machine", "process")}
    owner = Owner(texts["source"], texts["work"]) if texts["source"] else None
    return _Claim(path, owner, texts["machine"], texts["process"] or "unknown process")


@contextmanager
def _free(fs: pafs.FileSystem, claim: _Claim) -> Iterator[bool | None]:
    """Whether the process of a claim is dead: True and False where its lock tells, else None.
    Inside, a process that has just written the claim cannot lock it.
    """
    if not isinstance(fs, pafs.LocalFileSystem):
        yield None
        return
    try:
        file = Path(claim.path).open("r+b")  # noqa: SIM115
    except OSError:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            yield None
            return
        yield True if claim.machine == _machine() else None
