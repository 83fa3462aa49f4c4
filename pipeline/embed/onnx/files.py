"""Which files an ONNX model is made of: weights above 2 GB, and of many exporters all, lie beside
the model in files of their own.

Their names stand in the model, in the entries `location` of its tensors' external data.

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

from pipeline.embed.onnx.embedder import numbers_in
from pipeline.errors import DataError, PipelineError
from pipeline.images.value_range import FULL, ValueRange, from_json
from pipeline.storage.places import file_info, resolve_uri
from pipeline.storage.transfer import download, open_patiently
from pipeline.uri import is_uri, join, parent, public

_BLOCK = 2**24


@dataclass(frozen=True)
class ModelFiles:
    """A hash of the model and of what lies beside it; and mean, deviation and range of values that
    its metadata says, () where it does not.
    """

    digest: str
    value_range: ValueRange = FULL
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def files_of(path: str) -> ModelFiles:
    """The files of the model at a path or URI.

    Raises:
        PipelineError: one is not there.
    """
    content = _content(path)
    hashed = blake2b(digest_size=8)
    hashed.update(content)
    model = parsed(content, public(path))
    for name, place in _beside(model, path).items():
        hashed.update(f"{name}\0".encode())
        with open_patiently(*_there(place, path)) as stream:
            while block := stream.read(_BLOCK):
                hashed.update(block)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    spread = numbers_in(metadata, "value_range", public(path)) or None
    value_range = from_json(spread, f"value_range of {public(path)}") or FULL
    mean, std = (numbers_in(metadata, one, public(path)) for one in ("mean", "std"))
    return ModelFiles(hashed.hexdigest(), value_range, mean, std)


def on_this_node(path: str, digest: str) -> str:
    """A local path of the model: its own, or that of a copy below the folder of temporary files."""
    if not is_uri(path):
        return path
    root, _, name = path.partition("?")[0].rpartition("/")
    folder = Path(tempfile.gettempdir(), "raydino-models", digest)
    if not _whole(folder / name):
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent))
        beside = _beside(parsed(_content(path), public(path)), path)
        for place in (path, *beside.values()):
            target = fresh / place.partition("?")[0].removeprefix(f"{root}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            download(*_there(place, path), target)
        with folder.with_name(f"{digest}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed
            if _whole(folder / name):  # another worker of this node was faster, and uses it
                shutil.rmtree(fresh)
            else:
                shutil.rmtree(folder, ignore_errors=True)  # something of it was cleaned away
                fresh.rename(folder)
    return str(folder / name)


def size_of(model: str) -> int:
    """Bytes of a local model with the files beside it."""
    file = Path(model)
    beside = external_files(file.read_bytes(), model)
    return sum(one.stat().st_size for one in (file, *(file.parent / name for name in beside)))


def is_onnx(place: str | Path) -> bool:
    """Whether a path or URI names a model in ONNX."""
    return str(place).partition("?")[0].endswith(".onnx")


def _whole(model: Path) -> bool:
    if not model.is_file():
        return False
    names = external_files(model.read_bytes(), str(model))
    return all((model.parent / name).is_file() for name in names)


def _beside(model: Any, path: str) -> dict[str, str]:
    """The files beside the model at a path or URI: places by names."""
    folder, _ = parent(path if is_uri(path) else Path(path))
    names = _external(model, public(path))
    return {name: str(join(folder, *PurePosixPath(name).parts)) for name in names}


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
    return _external(parsed(model, name), name)


def _external(model: Any, name: str) -> tuple[str, ...]:
    locations = sorted({one for tensor in _tensors(model) for one in _places(tensor)})
    for one in locations:
        if not one or PurePosixPath(one).is_absolute() or ".." in PurePosixPath(one).parts:
            raise DataError(
                f"{name} has weights in {one!r}, which is not in its folder",
                "export it again with all files in one folder",
            )
    return tuple(locations)


def parsed(model: bytes, name: str = "the model") -> Any:
    """The `onnx.ModelProto` of a `.onnx` file, without the weights beside it.

    Raises:
        DataError: it is no ONNX model, or the package onnx is missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise DataError(
            f"{name} needs the package onnx, which is not installed",
            "from the clone: python -m pip install -c constraints.txt -e '.[onnx]'",
        ) from error
    try:
        return onnx.load_model_from_string(model)
    except (DecodeError, ValueError) as error:
        raise DataError(
            f"{name} cannot be opened: it is no ONNX model", "export it again"
        ) from error


def _tensors(message: Any) -> Iterator[Any]:
    """All tensors in a message: of graphs, of functions, and of the attributes of their nodes."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if hasattr(value, "__len__") else [value]:
                yield from _tensors(inner)


def _places(tensor: Any) -> list[str]:
    return [entry.value for entry in tensor.external_data if entry.key == "location"]
