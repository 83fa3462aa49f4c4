"""A file of tensors in the form of safetensors, with a checksum of each tensor in its header.

The form (https://huggingface.co/docs/safetensors): eight bytes with the length of a header, the
header in JSON, and the tensors' bytes. We write and read it ourselves: the library would copy all
bytes before it writes them, and it has no checksums. In the header's `__metadata__` ours has the
CRC-32 of each tensor under its name. Any reader of safetensors reads it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.storage.places import resolve_uri, with_retries
from pipeline.uri import Place

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in TYPES.items()}
BLOCK = 16 * 2**20  # bytes that are read at once


def as_bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor on the host as uint8, without a copy where it is contiguous."""
    flat: np.ndarray[Any, Any] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def write(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Writes tensors that are on the host, and waits for the disk.

    Returns:
        The CRC-32 of the header; in the header are those of the tensors.

    Raises:
        OSError: the disk is full or not writable.
    """
    entries: dict[str, Any] = {"__metadata__": {}}
    end = 0
    # largest elements first: then each begins at a multiple of its size
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        entries["__metadata__"][name] = f"{zlib.crc32(as_bytes(tensor).data):08x}"
        entries[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    with path.open("wb") as file:
        file.write(header)
        for name in order:
            file.write(as_bytes(tensors[name]).data)
        file.flush()
        os.fsync(file.fileno())
    return zlib.crc32(header)


class Parts:
    """Reads parts of a file at a path or a URI, from several threads at once."""

    def __init__(self, place: Place) -> None:
        """Raises OSError where it cannot be opened."""
        fs, self.path = resolve_uri(str(place))
        self.local = fs.type_name == "local"
        if self.local:
            self.file: Any = Path(self.path).open("rb", buffering=0)  # noqa: SIM115
        else:
            self.file = with_retries(f"reading {self.path}", lambda: fs.open_input_file(self.path))

    def read(self, offset: int, size: int) -> Tensor:
        """Bytes `[size]` uint8 on the host.

        Raises:
            ValueError: the file ends before.
            OSError: it could not be read; another try may help.
        """
        content = torch.empty(size, dtype=torch.uint8, device="cpu")
        array, done = content.numpy(), 0
        while done < size:
            part = array[done : done + BLOCK]
            count = self._into(part, offset + done)
            if not count:
                raise ValueError(f"{self.path} is cut short")
            done += count
        return content

    def _into(self, part: np.ndarray[Any, Any], offset: int) -> int:
        if self.local:
            return os.preadv(self.file.fileno(), [part.data], offset)
        content = with_retries(f"reading {self.path}", lambda: self.file.read_at(len(part), offset))
        part[: len(content)] = np.frombuffer(content, np.uint8)
        return len(content)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class TensorFile:
    """Tensors of a file, each read by itself and compared with its checksum."""

    def __init__(self, place: Place, size: int, checksum: int) -> None:
        """Reads the header.

        Args:
            place: of the file.
            size: of the file in bytes.
            checksum: of its header.

        Raises:
            ValueError: it is another one.
            OSError: it could not be read.
        """
        self.parts = Parts(place)
        length = bytes(self.parts.read(0, 8).numpy())
        self.begin = 8 + int.from_bytes(length, "little")
        if self.begin > size:
            raise ValueError(f"a header says that it has {self.begin:,} bytes")
        text = bytes(self.parts.read(8, self.begin - 8).numpy())
        if (own := zlib.crc32(text, zlib.crc32(length))) != checksum:
            raise ValueError(f"the checksum of a header is {own:08x} and was {checksum:08x}")
        self.entries = json.loads(text)
        self.checksums = self.entries.pop("__metadata__")

    def read(self, name: str) -> Tensor:
        """A tensor, on the host.

        Raises:
            ValueError: it is not there, or has other bytes than were written.
            OSError: it could not be read; another try may help.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise ValueError(f"{name} is not in it")
        begin, end = entry["data_offsets"]
        content = self.parts.read(self.begin + begin, end - begin)
        own, expected = zlib.crc32(content.numpy().data), int(self.checksums[name], 16)
        if own != expected:
            raise ValueError(f"the checksum of {name} is {own:08x} and was {expected:08x}")
        return content.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
