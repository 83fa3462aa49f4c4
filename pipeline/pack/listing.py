"""Lists a source of images: folders, files, patterns and lists of them, on a disk or at a URI.

What is listed depends on the source alone. Each thing that is there is one of three: an `Entry`
that is read, a `Refused` one that claims to hold images, or an `Other` that is left alone.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs as pafs

from pipeline.errors import DataError
from pipeline.images.kinds import claims_images
from pipeline.pack.patterns import States
from pipeline.pack.source_places import Entry, Place, inside, source_places
from pipeline.shards.columns import MANIFEST
from pipeline.storage.once import once
from pipeline.storage.places import list_files, public_uri

log = logging.getLogger("pipeline.pack")
_MARKS = (MANIFEST, "_done.json")
# Folders of Delta, Spark and Hive beside their tables: accounts, and parts that were never finished
_TABLE_LOGS = frozenset(("_delta_log", "_temporary", "_spark_metadata", "_change_data"))


@dataclass(frozen=True)
class Refused:
    """A file or row that gave no image: where, one of the documented reasons, what exactly."""

    source: str
    reason: str
    detail: str
    image_id: str | None = None


@dataclass(frozen=True)
class Other:
    """A file that claims to be no image and is left alone: where, why, what exactly."""

    source: str
    reason: str  # no_image, hidden, mark, link, label, bad_label, unread_archive
    detail: str


@dataclass(frozen=True)
class Listing:
    """What is in a source: files sorted by path, what is bad about it, what is left alone."""

    uri: str  # of a place in the storage where the source is
    root: str  # the folder that paths are relative to
    entries: tuple[Entry, ...]
    refused: tuple[Refused, ...]
    others: tuple[Other, ...]
    packed: frozenset[str]  # folders that hold the manifest of a pack
    chosen: bool  # files were named, or a pattern for them; no whole folder

    @property
    def links(self) -> int:
        """Links that were not followed."""
        reasons = [*(item.reason for item in self.refused), *(item.reason for item in self.others)]
        return reasons.count("link")


def readable(path: str) -> str:
    """A path as text: bytes that are no UTF-8 are written as backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def left_out(source: str, reason: str, detail: str) -> Refused | Other:
    """What cannot be read: a bad image where its name promises images, else left alone."""
    if claims_images(source):
        return Refused(source, reason, detail)
    return Other(source, "link" if reason == "link" else "no_image", detail)


def list_source(uri: str, *, follow_links: bool = False, field: str = "data.source") -> Listing:
    """List a source: sorted, each thing that is there once.

    Args:
        uri: a folder, a file, a pattern (`patterns`), or several of them with commas between.
        follow_links: read what links to files lead to, wherever that is.
        field: of the config, for sentences about the source.

    Raises:
        DataError: there is no such path, or no file in it that may hold an image.
    """
    return once(("list", uri, follow_links), lambda: _listed(uri, follow_links, field))


def _listed(uri: str, follow_links: bool, field: str) -> Listing:
    places = source_places(uri, field)
    root = _common([place.folder for place in places])
    entries: dict[str, Entry] = {}
    refused: dict[str, Refused] = {}
    others: dict[str, Other] = {}
    packed = set()
    for place in places:
        prefix = place.folder[len(root) :].strip("/")
        count = 0
        for item in _items(place, follow_links, field):
            count += 1
            relative = item.path if isinstance(item, Entry) else item.source
            path = f"{prefix}/{relative}" if prefix else relative
            folder, _, name = path.rpartition("/")
            if why := _passed_over(relative):
                others[path] = Other(readable(path), *why)
            elif isinstance(item, Entry):
                entries[path] = Entry(path, item.size, item.stamp)
            elif isinstance(item, Refused):
                refused[path] = Refused(readable(path), item.reason, item.detail)
            else:
                others[path] = Other(readable(path), item.reason, item.detail)
            if name == MANIFEST:
                packed.add(folder)
        if place.pattern is not None:
            if not count:
                raise DataError(
                    f"nothing fits the pattern {place.text}",
                    hint=f"check {field}: a folder, or a pattern such as folder/**/*.jpg.",
                )
            for said in place.pattern.missing():
                log.warning("%s in %s", said, place.text)
    if not entries and not refused:
        left = ", ".join(f"{item.source} ({item.reason})" for _, item in sorted(others.items())[:3])
        links = any(item.reason == "link" for item in others.values())
        raise DataError(
            f"no files under {public_uri(uri)}"
            + (f" but {len(others):,} that cannot be images, such as {left}" if others else ""),
            hint=f"{field} is a folder of images, tar files or parquet files."
            + (" With data.follow_links=true links to files are read." if links else ""),
        )
    return Listing(
        uri=places[0].uri,
        root=root,
        entries=tuple(sorted(entries.values(), key=lambda entry: os.fsencode(entry.path))),
        refused=tuple(sorted(refused.values(), key=lambda item: item.source)),
        others=tuple(sorted(others.values(), key=lambda item: item.source)),
        packed=frozenset(packed),
        chosen=all(place.pattern or place.file for place in places),
    )


def _passed_over(path: str) -> tuple[str, str] | None:
    """Reason and detail for what no one means by the images of a folder."""
    *folders, name = path.split("/")
    if any(part.startswith(".") for part in (*folders, name)):
        return "hidden", "hidden: a dot in front"
    if name in _MARKS:
        return "mark", "written by this project"
    if not _TABLE_LOGS.isdisjoint(folders):
        return "no_image", "in the log of a table"
    return None


def _common(folders: Sequence[str]) -> str:
    """The deepest folder that all are in; empty for buckets side by side."""
    common = folders[0].split("/")
    for folder in folders[1:]:
        pairs = zip(common, folder.split("/"), strict=False)
        common = common[: next((i for i, (a, b) in enumerate(pairs) if a != b), len(folder))]
        common = common[: folder.count("/") + 1]
    return "/".join(common) or ("/" if folders[0].startswith("/") else "")


def _items(place: Place, follow_links: bool, field: str) -> Iterator[Entry | Refused | Other]:
    if place.file:
        yield place.file
    elif isinstance(place.fs, pafs.LocalFileSystem):
        yield from _walk_local(place, follow_links, field)
    else:
        yield from _walk_remote(place)


def _walk_local(place: Place, follow_links: bool, field: str) -> Iterator[Entry | Refused | Other]:
    """Files under a folder that fit its pattern; folders are never entered by a link."""
    real_root = Path(place.folder).resolve()
    pattern = place.pattern
    waiting = [("", pattern.start if pattern else States())]
    while waiting:
        folder, states = waiting.pop()
        try:
            items = os.scandir(inside(place.folder, folder) if folder else place.folder)
        except OSError as error:
            if not folder:
                raise DataError(
                    f"cannot read the folder {place.folder}: {error.strerror}",
                    hint=f"check the rights of {field} (and the mount).",
                ) from error
            yield Refused(folder, "unreadable", f"a folder that cannot be read: {error.strerror}")
            continue
        with items:
            for item in items:
                path = f"{folder}/{item.name}" if folder else item.name
                below = pattern.step(states, item.name) if pattern else states
                if pattern and not below:
                    continue
                try:
                    if item.is_dir(follow_symlinks=False):
                        waiting.append((path, below))
                    elif pattern is None or pattern.accepts(below):
                        yield _local(item, path, real_root, follow_links)
                except OSError as error:  # gone since, or no right to look
                    yield left_out(path, "unreadable", f"cannot be looked at: {error.strerror}")


def _local(
    item: os.DirEntry[str], path: str, real_root: Path, follow_links: bool
) -> Entry | Refused | Other:
    """A file, or a link to one."""
    link = item.is_symlink()
    try:
        about = item.stat()
    except OSError as error:
        if not link:
            raise
        return left_out(path, "link", f"a link that leads nowhere: {error.strerror}")
    if not stat.S_ISREG(about.st_mode):  # reading a pipe would wait for ever
        if not link:
            return left_out(path, "not_an_image", "not a regular file")
        if stat.S_ISDIR(about.st_mode):
            target = Path(item.path).resolve()
            if target.is_relative_to(real_root):
                return Other(path, "link", "a link to a folder of the source")
            return Refused(path, "link", "a link to a folder, which is not followed")
        return left_out(path, "link", "a link to what is no regular file")
    if link and not follow_links and not Path(item.path).resolve().is_relative_to(real_root):
        return left_out(path, "link", "leads out of the source")
    return Entry(path, about.st_size, about.st_mtime_ns)


def _walk_remote(place: Place) -> Iterator[Entry]:
    """Files under a folder that fit its pattern; whole folders are listed by one call."""
    pattern = place.pattern
    waiting = [("", pattern.start if pattern else States())]
    while waiting:
        folder, states = waiting.pop()
        path = inside(place.folder, folder) if folder else place.folder
        deep = pattern is None or pattern.deep(states)
        for info in list_files(place.fs, path, recursive=deep, missing=False, folders=not deep):
            names = info.path[len(path) :].strip("/").split("/")
            relative = "/".join([folder, *names] if folder else names)
            below = states
            for name in names if pattern else ():
                below = pattern.step(below, name) if pattern else below
            if info.type == pafs.FileType.Directory:
                if below:
                    waiting.append((relative, below))
            elif pattern is None or pattern.accepts(below):
                yield Entry(relative, info.size, info.mtime_ns or 0)
