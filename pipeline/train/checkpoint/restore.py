"""From which checkpoint a group of workers goes on, and how its tensors reach all of them.

Where each worker holds whole networks (ddp), rank 0 alone reads, and the others get what it has in
large broadcasts: storage is read once, whatever the number of workers. Where networks are split
over the workers (fsdp), each reads what it holds and nothing else. What one rank cannot take, none
takes: then all go on from the checkpoint before.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from pipeline.errors import DamagedError, TrainError
from pipeline.train.checkpoint import files
from pipeline.train.checkpoint.names import divided, nested
from pipeline.train.checkpoint.reader import Reader, described, read_into
from pipeline.train.checkpoint.state import Saved, checked, checkpoints
from pipeline.train.checkpoint.writer import INDEX
from pipeline.uri import Place, public

log = logging.getLogger("pipeline.train")
SEEN_S = 10.0  # so long a checkpoint that another node has read may take to be seen
BUFFER = 2**26  # bytes of one broadcast; 64 MiB are enough for the bandwidth of any link
ALIGNED = 16  # bytes: every type begins at a multiple of its size
T = TypeVar("T")


class Restorable(Protocol):
    """What takes the tensors of a checkpoint."""

    def live(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors that it holds and a checkpoint of these names has, by name; they are filled
        in place. States of an optimizer are made where they are not there yet.
        """
        ...

    def take(self, state: dict[str, Any]) -> None:
        """Takes what is not in `live`: nested dicts of tensors and numbers."""
        ...


class Source:
    """A checkpoint that all ranks have found whole."""

    def __init__(self, saved: Saved, split: bool) -> None:
        """Args: the checkpoint, and whether each rank reads its own slices."""
        self.saved, self.split = saved, split
        self.tensors: dict[str, Tensor] = {}  # whole ones in memory, where they are
        self.numbers: dict[str, Any] = {}
        self.reader: Reader | None = None
        self.bytes_read = 0

    @property
    def step(self) -> int:
        """Steps done."""
        return self.saved.step

    def check(self) -> None:
        """Reads this rank's share and holds it: for whole networks all of it on rank 0, else every
        n-th file. So each byte was read and compared once before anything is changed.

        Raises:
            DamagedError: other bytes are there than were written.
            OSError: it could not be read.
        """
        rank, ranks = _rank(), _ranks()
        if not self.split or self.saved.earlier:
            if rank == 0 or self.split:
                self.tensors, self.numbers = divided(self.saved.load())
                self.bytes_read = sum(x.nbytes for x in self.tensors.values())
            return
        with self.saved.readable():
            self.reader = self.saved.reader()
            self.numbers = self.saved.meta.get("numbers", {})
            names = sorted(set(self.saved.meta["files"]) - {INDEX})
            self.reader.keep(names[rank::ranks])

    def into(self, state: Restorable, device: torch.device) -> None:
        """Fills a state on all ranks; each calls it.

        Args:
            state: made from the same plan as the one that was saved.
            device: of this rank, on which its group sends tensors.

        Raises:
            TrainError: the checkpoint has other tensors than the state.
            DamagedError: a slice has other bytes than were written.
        """
        shapes = self._shapes()
        live = state.live(shapes)
        _check(self.saved, live, shapes)
        fresh = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in shapes.items()
            if name not in live
        }
        targets = live | fresh
        if self.reader is not None:
            with self.saved.readable():
                read_into(self.reader, targets)
            self.bytes_read = self.reader.bytes_read
            self.close()
        else:
            for name, whole in self.tensors.items():
                put(targets[name], whole)
            self.tensors = {}
            if not self.split:
                broadcast([targets[name] for name in sorted(targets)], device)
        state.take(nested(fresh | self.numbers))

    def close(self) -> None:
        """Closes files and forgets what is held."""
        if self.reader is not None:
            self.reader.close()

    def _shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Of all tensors; with the numbers from rank 0, where others have not read."""
        if self.reader is not None:
            return described(self.reader)
        shapes = {name: (x.shape, x.dtype) for name, x in self.tensors.items()}
        if not self.split:
            shapes, self.numbers = from_rank_0((shapes, self.numbers))
        return shapes


def newest(folder: Place, split: bool = False) -> Source | None:
    """The newest checkpoint that every rank can read its share of, on all ranks alike; None where
    there is none. It is rank 0's newest: storage may show others an older listing.

    Args:
        folder: the run's `checkpoints` folder.
        split: whether networks are split over the ranks.

    Raises:
        TrainError: there are checkpoints and all of them are damaged; a rank cannot read it.
        OSError: a file could not be read; another try may help.
    """
    complete = checkpoints(folder) if _rank() == 0 else []
    count = from_rank_0(len(complete))
    for number in reversed(range(count)):
        place, meta = from_rank_0(
            (str(complete[number].path), complete[number].meta) if complete else ("", {})
        )
        saved = Saved(place if "://" in place else Path(place), meta)
        source = Source(saved, split)
        damages = _all(_damage(source))
        if not any(damages):
            return source
        if _rank() == 0:
            log.warning("%s; using an earlier one", next(filter(None, damages)))
    if count:
        raise TrainError(
            f"all checkpoints in {public(folder)} are damaged",
            "put one back from a copy, or remove them to begin again",
        )
    return None


def _damage(source: Source) -> str:
    """What is wrong with this rank's share; "" where nothing is."""
    try:
        if _rank() == 0:
            source.check()
        else:
            _patiently(source)
    except DamagedError as error:
        source.close()
        return error.what
    return ""


def _patiently(source: Source) -> None:
    """Waits some seconds for a checkpoint that is not seen yet: storage that nodes share may show a
    new folder to one of them later than to another.
    """
    end = time.monotonic() + SEEN_S
    while True:
        try:
            if source.split:  # other ranks read nothing of whole networks
                place = source.saved.path
                checked(place, *files.read_at(place))
                source.check()
            return
        except (OSError, ValueError, KeyError) as error:
            if time.monotonic() < end:
                time.sleep(0.5)
                continue
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TrainError(
                f"{socket.gethostname()} cannot read the checkpoint "
                f"{public(source.saved.path)}, from which worker 0 goes on: {why}",
                "run.folder must be storage that all nodes share and see alike",
            ) from error


def _check(
    saved: Saved, live: Mapping[str, Tensor], shapes: Mapping[str, tuple[torch.Size, torch.dtype]]
) -> None:
    """Raises TrainError where a tensor has another shape here than in the checkpoint, or none."""
    for name, tensor in live.items():
        shape = shapes[name][0] if name in shapes else None
        if shape != tensor.shape:
            said = "none" if shape is None else str(tuple(shape))
            raise TrainError(
                f"checkpoint {public(saved.path)} has {said} as {name}, "
                f"this network has {tuple(tensor.shape)}",
                "resume it with the configuration that it was made with, or give this run "
                "another name",
            )


def put(target: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into a target: all of it, or the slice that this rank holds."""
    if not isinstance(target, DTensor):
        target.detach().copy_(whole)
        return
    mesh = target.device_mesh
    everywhere = DTensor.from_local(
        whole.to(target.to_local().device), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    slices = everywhere.redistribute(mesh, target.placements).to_local()
    target.to_local().detach().copy_(slices)


# ---- Between ranks.


def broadcast(tensors: Sequence[Tensor], device: torch.device) -> None:
    """What rank 0 has in these tensors, on all ranks: small ones together, in order."""
    if _ranks() == 1:
        return
    for group in _groups(tensors):
        sizes = [x.nbytes for x in group]
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + size + (-size) % ALIGNED)
        buffer = torch.empty(ends[-1], dtype=torch.uint8, device=device)
        places = [
            buffer[begin : begin + size].view(x.dtype).view(x.shape)
            for x, begin, size in zip(group, ends, sizes, strict=False)
        ]
        if _rank() == 0:
            for x, place in zip(group, places, strict=True):
                place.copy_(x)
        dist.broadcast(buffer, 0)
        if _rank() != 0:
            for x, place in zip(group, places, strict=True):
                x.detach().copy_(place)


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        group.append(tensor)
        size += tensor.nbytes
        if size >= BUFFER:
            yield group
            group, size = [], 0
    if group:
        yield group


def from_rank_0(value: T) -> T:
    """What rank 0 says, on all ranks."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _all(value: T) -> list[T]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * _ranks()
    dist.all_gather_object(values, value)
    return values


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
