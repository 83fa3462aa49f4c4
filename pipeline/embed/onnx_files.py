"""Which files an ONNX model is made of: weights above 2 GB, and of many exporters all, lie beside
the model in files of their own.

Their names stand in the model, in the entries `location` of its tensors' external data
(onnx.proto: ModelProto.graph, GraphProto.node and initializer, TensorProto.external_data). The few
fields on the way are read here from the protobuf wire format, so that no package is needed for it.

A model at a URI is copied to each node once, for onnxruntime reads files.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import DataError, PipelineError
from pipeline.storage.places import file_info, resolve_uri
from pipeline.storage.transfer import download, open_patiently
from pipeline.uri import is_uri, join, parent, public

# Numbers of the fields that lead to tensors: of a message, field number -> kind of message in it.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # of an entry
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5
_BLOCK = 2**24


@dataclass(frozen=True)
class ModelFiles:
    """A model's files: the places of the model and of what lies beside it, and a hash of all."""

    places: tuple[str, ...]
    digest: str


def files_of(path: str) -> ModelFiles:
    """The files of the model at a path or URI.

    Raises:
        PipelineError: one is not there.
    """
    content = _content(path)
    hashed = blake2b(digest_size=8)
    hashed.update(content)
    folder, _ = parent(path if is_uri(path) else Path(path))
    places = [path]
    for name in external_files(content, public(path)):
        places.append(str(join(folder, *PurePosixPath(name).parts)))
        hashed.update(f"{name}\0".encode())
        fs, place = _there(places[-1], path)
        with open_patiently(fs, place) as stream:
            while block := stream.read(_BLOCK):
                hashed.update(block)
    return ModelFiles(tuple(places), hashed.hexdigest())


def on_this_node(path: str, digest: str) -> str:
    """A local path of the model: its own, or that of a copy below the folder of temporary files."""
    if not is_uri(path):
        return path
    root, _, name = path.partition("?")[0].rpartition("/")
    folder = Path(tempfile.gettempdir(), "raydino-models", digest)
    if not _whole(folder / name):
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent))
        for place in files_of(path).places:
            target = fresh / place.partition("?")[0].removeprefix(f"{root}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            download(*resolve_uri(place), target)
        with folder.with_name(f"{digest}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed
            if _whole(folder / name):  # another worker of this node was faster, and uses it
                shutil.rmtree(fresh)
            else:
                shutil.rmtree(folder, ignore_errors=True)  # something of it was cleaned away
                fresh.rename(folder)
    return str(folder / name)


def is_onnx(place: str | Path) -> bool:
    """Whether a path or URI names a model in ONNX."""
    return str(place).partition("?")[0].endswith(".onnx")


def _whole(model: Path) -> bool:
    if not model.is_file():
        return False
    names = external_files(model.read_bytes(), str(model))
    return all((model.parent / name).is_file() for name in names)


def _there(place: str, model: str) -> tuple[Any, str]:
    fs, path = resolve_uri(place)
    if not file_info(fs, path).is_file:
        beside = f", which holds weights of {public(model)}" if place != model else ""
        raise PipelineError(
            f"no embedder: there is no {public(place)}{beside}",
            "a model in ONNX is its .onnx file and all files that were exported with it",
        )
    return fs, path


def _content(place: str) -> bytes:
    fs, path = _there(place, place)
    with open_patiently(fs, path) as stream:
        return bytes(stream.read())


def external_files(model: bytes, name: str = "the model") -> tuple[str, ...]:
    """Names of the files beside a model that hold its weights, sorted; none where it has them all.

    Args:
        model: the content of the `.onnx` file.
        name: for messages.

    Raises:
        DataError: it is no ONNX model, or a name leads out of its folder.
    """
    try:
        locations = sorted(set(_locations(memoryview(model), "model")))
    except (IndexError, ValueError) as error:
        raise DataError(
            f"{name} cannot be opened: it is no ONNX model", "export it again"
        ) from error
    for one in locations:
        if not one or PurePosixPath(one).is_absolute() or ".." in PurePosixPath(one).parts:
            raise DataError(
                f"{name} has weights in {one!r}, which is not in its folder",
                "export it again with all files in one folder",
            )
    return tuple(locations)


def _locations(message: memoryview, kind: str) -> Iterator[str]:
    if kind == "entry":
        fields = {number: bytes(value).decode() for number, value in _fields(message)}
        if fields.get(_KEY) == "location":
            yield fields.get(_VALUE, "")
        return
    for number, value in _fields(message):
        if inner := _INSIDE[kind].get(number):
            yield from _locations(value, inner)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Fields of a message that have a length, with their numbers; others are passed over."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            size, at = _varint(message, at)
            if size > len(message) - at:
                raise ValueError("a field is longer than its message")
            yield number, message[at : at + size]
            at += size
        elif kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in (_EIGHT, _FOUR):
            at += 8 if kind == _EIGHT else 4
        else:
            raise ValueError(f"a field of kind {kind}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
