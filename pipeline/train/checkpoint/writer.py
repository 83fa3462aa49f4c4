"""Tensors of one rank or of several into the files of a checkpoint, by torch's checkpoint planner.

`torch.distributed.checkpoint` plans who writes which part: of what all hold, one writes; of what is
split over the ranks (DTensors), each its own. Its own writers pickle their index; this one writes
safetensors and JSON. `index.json` has for each tensor its type, its whole shape, and where its
parts are: `[rank, offsets, sizes]`, the rank's file being `rank-00000.safetensors`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from pipeline.train.checkpoint import files, tensor_file
from pipeline.train.checkpoint.names import divided
from pipeline.train.checkpoint.tensor_file import TYPES
from pipeline.uri import Place

INDEX = "index.json"


def file_of(rank: int) -> str:
    """The name of a rank's file of tensors."""
    return f"rank-{rank:05d}.safetensors"


def key_of(name: str, offsets: Sequence[int], whole: bool) -> str:
    """The name of a part of a tensor in its file: that of the tensor, with the offsets if split."""
    return name if whole else f"{name}@{','.join(map(str, offsets))}"


def planner_of(tensors: Mapping[str, Any], coordinator: bool = True) -> DefaultSavePlanner:
    """A planner over flat names."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), None, coordinator)
    return planner


def write_alone(place: Place, state: Mapping[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """One process writes a checkpoint at its place `…/step-…`, and waits for it.

    Returns:
        `meta` as it was written: with numbers, files, bytes and checksums.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    tensors, numbers = divided(state)
    planner = planner_of(tensors)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    writer = Writer(place, 0, meta | {"numbers": numbers})
    try:
        [plan] = writer.prepare_global_plan(plans)
        writer.finish(metadata, [writer.write_data(plan, planner).wait()])
    finally:
        files.abandon(place)
    return writer.meta


class Writer(StorageWriter):
    """Writes the parts of one rank; the coordinator makes room before and completes it after.

    Attributes:
        meta: what `meta.json` says; `finish` adds the files.
    """

    def __init__(self, place: Place, rank: int, meta: dict[str, Any] | None = None) -> None:
        self.place, self.rank, self.meta = place, rank, meta or {}
        self.index = ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, before anybody writes: notes who writes what, and makes room."""
        self.index = index_of(plans)
        files.begin(self.place)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's parts into its file; the result is of that file."""
        tensors = {}
        for item in plan.items:
            if item.tensor_data is None:
                raise TypeError(f"{item.index.fqn} is no tensor: only tensors are written")
            data = planner.resolve_data(item)
            tensors[_key(item)] = data.detach().cpu()  # type: ignore[union-attr]
        results = []
        if tensors:
            name = file_of(self.rank)
            checksum = 0

            def write(path: Any) -> None:
                nonlocal checksum
                checksum = tensor_file.write(path, tensors)

            size = files.write(self.place, name, write)
            results = [WriteResult(MetadataIndex(name), size, checksum)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when all have written: the index, then `meta.json`."""
        content = {
            result.index.fqn: {"bytes": result.size_in_bytes, "crc32": result.storage_data}
            for each in results
            for result in each
        }
        text = self.index.encode()
        content[INDEX] = {"bytes": len(text), "crc32": files.checksum(text)}
        files.write_text(self.place, INDEX, text)
        self.meta |= {
            "files": content,
            "bytes": sum(each["bytes"] for each in content.values()),
            "crc32": files.checksum_of(content),
        }
        files.complete(self.place, json.dumps(self.meta, indent=1).encode())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any place will do."""
        return True


def _key(item: WriteItem) -> str:
    data = item.tensor_data
    assert data is not None  # `write_data` has looked
    return key_of(item.index.fqn, data.chunk.offsets, data.chunk.sizes == data.size)


def index_of(plans: Sequence[SavePlan]) -> str:
    """What `index.json` says of these plans, which are in the order of their ranks."""
    tensors: dict[str, Any] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            if (data := item.tensor_data) is None:
                raise TypeError(f"{item.index.fqn} is no tensor: only tensors are written")
            entry = tensors.setdefault(
                item.index.fqn,
                {"dtype": TYPES[data.properties.dtype], "shape": list(data.size), "parts": []},
            )
            entry["parts"].append([rank, list(data.chunk.offsets), list(data.chunk.sizes)])
    return json.dumps({"tensors": tensors}, separators=(",", ":"))
