"""Keeps the working copy of a remote run folder in step with it: pulled at the start of a job,
pushed while it runs and at its end, also where it fails.

The copy has the small files: plan, config, journal, marks, pictures, tables, report, weights. What
all nodes read and write at the URI is not in it: checkpoints, shards, vectors, the folders of pack.

What is newer at the URI wins: a file that changed there since this copy saw it last was written by
a job elsewhere, and one that vanished there was deleted. What changed here only is pushed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import one_line
from pipeline.storage.places import file_info, list_files, make_folder, resolve_uri
from pipeline.storage.run_folder import RunFolder, atomic, write_json
from pipeline.storage.transfer import download, upload
from pipeline.uri import public

log = logging.getLogger("pipeline")

MARK = ".mirror.json"  # what was the same in both places when this copy saw it last
APART = ("checkpoints", "shards", "curated", "source", "vectors")  # folders that are not copied
RECORDS = (["pretrain", "ray"], ["finetune", "ray"], ["finetune", "checkpoints"])
WRITTEN_THERE = (
    "pretrain/bad_images.parquet",
    "embed/bad.parquet",
    "finetune/bad.parquet",
)
ROUND = r"round-\d+"  # a run folder in the run folder, of an earlier round
EVERY_S = 30.0
AT_ONCE = 8

Seen = list[int]  # bytes, time of the last change in ns


@contextmanager
def mirrored(
    folder: RunFolder, fetched: Callable[[list[str]], object] = len
) -> Iterator[Callable[[], object]]:
    """Inside, `folder.path` is a copy of the run folder that is kept in step; gives a function that
    pushes at once. For a local run folder there is nothing to do.

    Args:
        folder: of the run.
        fetched: called with the names of the files that another job has left, before anybody else
            sees them.

    Raises:
        StorageError: the folder cannot be read at the start, or not be written at the end. Failures
            in between are said, and made up for by the next push.
    """
    if not folder.uri:
        yield lambda: None
        return
    mirror = Mirror(folder.path, folder.uri)
    fetched(mirror.pull())
    finished = threading.Event()
    pusher = threading.Thread(target=mirror.push_often, args=[finished], daemon=True)
    pusher.start()

    def end() -> None:
        finished.set()
        pusher.join()

    try:
        yield mirror.push
    except BaseException:
        end()
        try:
            mirror.push()
        except OSError as error:
            log.error("%s; %s keeps everything", one_line(error), folder.path)
        raise
    end()
    mirror.push()


class Mirror:
    """A local folder and its remote original. Only one job at a time may use the local folder."""

    def __init__(self, path: Path, uri: str) -> None:
        self.path, self.shown = path, public(uri)
        self.fs, self.root = resolve_uri(uri)
        self.mark = path / MARK
        self.seen: dict[str, dict[str, Seen]] = {}
        self.lock = threading.Lock()
        with contextlib.suppress(FileNotFoundError, ValueError):  # a broken one: all is pulled
            self.seen = json.loads(self.mark.read_text())

    def pull(self) -> list[str]:
        """Brings the copy up to date; gives the names of the files that were fetched.

        Raises:
            StorageError: the run folder cannot be read.
        """
        file_info(self.fs, self.root, tries=3)  # whether anybody answers is known soon
        there = {
            name: [int(info.size), int(info.mtime_ns or 0)]
            for info in list_files(self.fs, self.root)
            if _belongs(name := str(info.path)[len(self.root) :].lstrip("/"))
        }
        for name in self.seen.keys() - there.keys():
            (self.path / name).unlink(missing_ok=True)
            del self.seen[name]
        changed = [
            name
            for name, state in there.items()
            if not (self.path / name).is_file() or self.seen.get(name, {}).get("there") != state
        ]

        def fetch(name: str) -> None:
            with atomic(self.path / name) as temporary:
                download(self.fs, f"{self.root}/{name}", temporary)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(fetch, changed))
        for name in changed:
            self.seen[name] = {"there": there[name], "here": _state(self.path / name)}
        self._remember()
        return changed

    def push(self) -> list[str]:
        """Uploads what has changed here; gives the names of those files.

        Raises:
            StorageError: the run folder cannot be written.
        """
        with self.lock:
            pushed = []
            for name in self._in_order():
                with (
                    contextlib.suppress(FileNotFoundError),  # removed meanwhile
                    self._held(name) as link,
                ):
                    state = _state(link)
                    if self.seen.get(name, {}).get("here") == state:
                        continue
                    # A journal grows all the time: what it has now are whole lines.
                    upload(link, self.fs, f"{self.root}/{name}", state[0])
                    info = file_info(self.fs, f"{self.root}/{name}")
                    there = [int(info.size), int(info.mtime_ns or 0)]
                    self.seen[name] = {"there": there, "here": state}
                    # At once: a kill must not make our own upload look like somebody else's.
                    self._remember()
                    pushed.append(name)
            return pushed

    @contextlib.contextmanager
    def _held(self, name: str) -> Iterator[Path]:
        """The file under a second name, so that one that is replaced meanwhile is sent whole."""
        link = self.path / f".{uuid.uuid4().hex}.push"
        os.link(self.path / name, link)
        try:
            yield link
        finally:
            link.unlink()

    def push_often(self, finished: threading.Event) -> None:
        """Pushes every 30 s, or more rarely where a push takes long, until `finished`."""
        wait, failed = EVERY_S, False
        while not finished.wait(wait):
            begin = time.monotonic()
            try:
                self.push()
            except OSError as error:
                if not failed:
                    log.warning("%s; the run goes on, %s keeps all", one_line(error), self.path)
                failed = True
            else:
                failed = False
            wait = max(EVERY_S, 10 * (time.monotonic() - begin))

    def _in_order(self) -> list[str]:
        """What a file speaks of comes before it: `track.json` says how much of the journal was sent
        (too little is harmless), and a stage's mark says that all its files are there.
        """

        def place(name: str) -> tuple[int, str]:
            return (name == "metrics.jsonl") + 2 * name.endswith("_done.json"), name

        files = [str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file()]
        return sorted(filter(_belongs, files), key=place)

    def _remember(self) -> None:
        write_json(self.mark, self.seen)


def upload_folder(local: Path, uri: str, mark: str) -> None:
    """Uploads a folder of files that never change, once; `mark` is the file that goes last."""
    fs, root = resolve_uri(uri)
    make_folder(fs, root)
    if file_info(fs, f"{root}/{mark}").is_file:
        return
    names = [str(p.relative_to(local)) for p in sorted(local.rglob("*")) if p.is_file()]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(
            pool.map(
                lambda name: upload(local / name, fs, f"{root}/{name}"),
                [name for name in names if name != mark],
            )
        )
    upload(local / mark, fs, f"{root}/{mark}")


def _belongs(name: str) -> bool:
    """Whether a file of the run folder is in the copy."""
    parts = name.split("/")
    if any(part.startswith(".") for part in parts) or not parts[-1]:
        return False
    if re.fullmatch(ROUND, parts[0]):
        parts = parts[1:]
    if parts[0] in APART or parts[:2] in RECORDS:  # records of one attempt
        return False
    # these have shards, tables and vectors in folders of their own
    tables = parts[0] in ("pack", "curate", "evaluate") and len(parts) > 2
    return not tables and "/".join(parts) not in WRITTEN_THERE


def _state(path: Path) -> Seen:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]
