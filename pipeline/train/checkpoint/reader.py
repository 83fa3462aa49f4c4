"""The tensors of a checkpoint, whole or the slices that one rank needs, each part checked."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from pipeline.train.checkpoint import files
from pipeline.train.checkpoint.tensor_file import DTYPES, TensorFile
from pipeline.train.checkpoint.writer import INDEX, file_of, key_of
from pipeline.uri import Place, join

THREADS = 4  # that read and sum up parts at once
Part = tuple[str, str]  # a file and the name in it


class Reader(StorageReader):
    """Reads parts of a checkpoint of version 5.

    Attributes:
        bytes_read: of tensors, so far.
    """

    def __init__(self, place: Place, content: Mapping[str, Mapping[str, int]]) -> None:
        """A reader of the files of a `meta.json`, with their bytes and checksums."""
        self.place, self.content = place, content
        self.metadata: Metadata | None = None
        self.parts: dict[MetadataIndex, Part] = {}
        self.opened: dict[str, TensorFile] = {}
        self.kept: dict[Part, Tensor] = {}  # read before they are asked for
        self.bytes_read = 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What `index.json` says.

        Raises:
            ValueError: it is another one than was written.
        """
        if self.metadata is None:
            text = files.read(self.place, INDEX)
            if files.checksum(text) != self.content[INDEX]["crc32"]:
                raise ValueError(f"the checksum of {INDEX} is another one")
            self.metadata = Metadata(
                {name: self._described(name, x) for name, x in json.loads(text)["tensors"].items()}
            )
        return self.metadata

    def _described(self, name: str, entry: dict[str, Any]) -> TensorStorageMetadata:
        shape = torch.Size(entry["shape"])
        chunks = []
        for number, (rank, offsets, sizes) in enumerate(entry["parts"]):
            index = MetadataIndex(name, offsets, number)
            self.parts[index] = file_of(rank), key_of(name, offsets, torch.Size(sizes) == shape)
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise ValueError(f"{name} is there in part")
        return TensorStorageMetadata(TensorProperties(DTYPES[entry["dtype"]]), shape, chunks)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Puts each part that is wanted into place.

        Raises:
            ValueError: other bytes are there than were written.
            OSError: they could not be read; another try may help.
        """
        items: dict[Part, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            items[self.parts[item.storage_index]].append(item)

        def put(part: Part) -> None:
            content = self._part(part)
            for item in items[part]:
                target = planner.resolve_tensor(item).detach()
                source = content
                for axis, (begin, size) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    source = source.narrow(axis, begin, size)
                target.copy_(source)
                planner.commit_tensor(item, target)

        self._each(put, items)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def keep(self, names: Iterable[str]) -> None:
        """Reads whole files and holds their parts until they are asked for: a later read of these
        parts can then not fail, and takes no time.

        Raises:
            ValueError: other bytes are there than were written.
            OSError: they could not be read; another try may help.
        """
        self.read_metadata()
        asked = set(names)

        def hold(part: Part) -> None:
            self.kept[part] = self._part(part)

        self._each(hold, [part for part in self.parts.values() if part[0] in asked])

    def _each(self, act: Any, parts: Iterable[Part]) -> None:
        parts = list(parts)
        for name in {name for name, _ in parts} - self.opened.keys():
            said = self.content[name]
            self.opened[name] = TensorFile(join(self.place, name), said["bytes"], said["crc32"])
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(act, parts))

    def _part(self, part: Part) -> Tensor:
        if part in self.kept:
            return self.kept.pop(part)
        tensor = self.opened[part[0]].read(part[1])
        self.bytes_read += tensor.nbytes
        return tensor

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any place will do."""
        return True

    def close(self) -> None:
        """Closes the files, and forgets what is held."""
        for file in self.opened.values():
            file.parts.close()
        self.opened.clear()
        self.kept.clear()


def read_into(reader: Reader, targets: Mapping[str, Tensor]) -> None:
    """Fills tensors from a checkpoint: whole ones, or this rank's slices of DTensors.

    Raises:
        ValueError: one has another shape in the checkpoint; other bytes are there.
        RuntimeError: one is not in it.
        OSError: they could not be read; another try may help.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), reader.read_metadata(), True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def described(reader: Reader) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Whole shape and type of each tensor in a checkpoint."""
    return {
        name: (each.size, each.properties.dtype)
        for name, each in reader.read_metadata().state_dict_metadata.items()
        if isinstance(each, TensorStorageMetadata)
    }


def read_whole(reader: Reader, parts: Iterable[str] = ()) -> dict[str, Tensor]:
    """Whole tensors on the host: all of them, or those whose names begin with `part/`.

    Raises:
        ValueError: other bytes are there than were written.
        OSError: they could not be read; another try may help.
    """
    starts = tuple(f"{part}/" for part in parts)
    targets = {
        name: torch.empty(shape, dtype=dtype, device="cpu")
        for name, (shape, dtype) in described(reader).items()
        if not starts or name.startswith(starts)
    }
    read_into(reader, targets)
    return targets
