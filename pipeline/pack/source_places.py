"""Which places a source names: folders, files and patterns between commas, in one storage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from pyarrow import fs as pafs

from pipeline.errors import DataError, StorageError
from pipeline.pack.patterns import SPECIAL, Pattern, is_pattern, split_list
from pipeline.storage.places import absolute_uri, file_info, public_uri, resolve_uri
from pipeline.uri import is_uri

_QUERY = re.compile(r"\?(?=\w+=)")  # of a URI; any other question mark stands for a letter


@dataclass(frozen=True)
class Entry:
    """A file of the source: path under its root, bytes, last change (ns; 0 where unknown)."""

    path: str
    size: int
    stamp: int


@dataclass(frozen=True)
class Place:
    """One part of a source: a folder or what fits a pattern in it, or one file."""

    text: str  # as the user wrote it
    uri: str  # of the folder
    fs: pafs.FileSystem
    folder: str
    pattern: Pattern | None = None
    file: Entry | None = None

    def holds(self, fs: pafs.FileSystem, path: str) -> bool:
        """Whether a file at `path` would be part of the source."""
        inside, outside = path, self.folder
        if isinstance(fs, pafs.LocalFileSystem):
            inside, outside = str(Path(path).resolve()), str(Path(self.folder).resolve())
        outside = outside.rstrip("/") + "/"
        if self.file or fs != self.fs or not f"{inside}/".startswith(outside):
            return False
        if self.pattern is None:
            return True
        states = self.pattern.start
        for name in inside[len(outside) :].split("/"):
            states = self.pattern.step(states, name)
            if self.pattern.accepts(states):
                return True
        return False


def inside(root: str, path: str) -> str:
    """A path under the root of a listing, in its file system."""
    return f"{root.rstrip('/')}/{path}" if root else path


def absolute_source(text: str) -> str:
    """The same source by names that hold in any process: each of its parts is made absolute."""
    return ",".join(absolute_uri(part) for part in _parts(text))


def _parts(text: str) -> list[str]:
    """The parts between commas, but for a path that has commas in its own name."""
    parts = split_list(text)
    if not parts:
        raise DataError(f"{text!r} names no place", hint="name a folder, a file or a pattern.")
    if len(parts) == 1 or text.count("://") > 1:
        return parts
    whole = absolute_uri(text)
    first = min((at for at in map(whole.find, SPECIAL) if at >= 0), default=len(whole))
    folder = whole[:first].rpartition("/")[0]
    names = [whole] + [folder] * ("," in folder)
    return [text] if any(map(_is_there, names)) else parts


def _is_there(uri: str) -> bool:
    try:
        fs, path = resolve_uri(uri)
        return bool(file_info(fs, path, tries=3).type != pafs.FileType.NotFound)
    except StorageError:
        raise
    except (
        DataError,
        OSError,
        ValueError,
    ):  # no name of the storage: nothing is there
        return False


def source_places(source: str, field: str = "data.source") -> list[Place]:
    """The places that a source names, in one storage.

    Raises:
        DataError: there is no such path, or the places are in several storages.
    """
    places = []
    for part in _parts(source):
        try:
            places.append(_place(part, field))
        except StorageError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a name with a zero in it
            said = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise DataError(
                f"cannot open {public_uri(part)[:200]!r}: {said[:200]}",
                hint=f"check this path, which is {field} (and the mount).",
            ) from error
    if any(place.fs != places[0].fs for place in places):
        raise DataError(
            f"the parts of {public_uri(source)} are in several storages",
            hint=f"pack them apart: {field} takes a list of places in one storage.",
        )
    return places


def _place(part: str, field: str) -> Place:
    uri = absolute_uri(part)
    query = _QUERY.search(uri) if is_uri(uri) else None
    path, query_text = (uri[: query.start()], uri[query.start() :]) if query else (uri, "")
    if not is_pattern(path):
        fs, path = resolve_uri(uri)
        return _literal(uri, fs, path, field)
    first = min(at for at in map(path.find, SPECIAL) if at >= 0)
    folder, _, _ = path[:first].rpartition("/")
    pattern = path[len(folder) + 1 :]
    if is_uri(uri):
        pattern = unquote(pattern)
        if not is_uri(folder):
            raise DataError(
                f"{public_uri(part)} has a pattern in the name of its host or bucket",
                hint=f"name the bucket in {field}; patterns may follow it.",
            )
    fs, base = resolve_uri((folder or "/") + query_text)
    literal = inside(base, pattern.rstrip("/"))
    if file_info(fs, literal, tries=3).type != pafs.FileType.NotFound:
        return _literal(uri, fs, literal, field)
    if file_info(fs, base, tries=3).type == pafs.FileType.NotFound:
        raise _missing(part, field)
    return Place(public_uri(part), (folder or "/") + query_text, fs, base, Pattern(pattern))


def _literal(uri: str, fs: pafs.FileSystem, path: str, field: str) -> Place:
    info = file_info(fs, path, tries=3)
    if info.type == pafs.FileType.NotFound:
        raise _missing(uri, field)
    if info.type == pafs.FileType.Directory:
        return Place(public_uri(uri), uri, fs, path)
    folder, _, name = path.rpartition("/")
    if info.type != pafs.FileType.File:
        raise DataError(
            f"{public_uri(uri)} is neither a folder nor a file",
            hint=f"{field} is a folder of images, tar files or parquet files.",
        )
    file = Entry(name, info.size, info.mtime_ns or 0)
    return Place(public_uri(uri), uri, fs, folder or "/", file=file)


def _missing(uri: str, field: str) -> DataError:
    return DataError(
        f"no such path: {public_uri(uri)}",
        hint=f"check this path, which is {field} (and the mount).",
    )


def check_places(source: str, outputs: Mapping[str, str], field: str = "data.source") -> None:
    """Refuse outputs inside the source: a second run would pack what the first one wrote.

    Args:
        source: what is packed.
        outputs: places by what names them, such as `data.shards`.
        field: of the config, that names the source.

    Raises:
        DataError: an output lies in the source, or there is no such source.
    """
    places = source_places(source, field)
    for name, uri in outputs.items():
        if any(place.holds(*resolve_uri(uri)) for place in places):
            raise DataError(
                f"{name}={public_uri(uri)} lies inside the source {public_uri(source)}",
                hint="choose data.shards and run.folder beside it; the source is only read.",
            )
