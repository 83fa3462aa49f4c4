"""Gradients of CPU workers on one machine, averaged through memory that all of them map.

DDP over gloo sends them through sockets, which costs more CPU time than adding them does
(benchmarks/step.py). Here each worker writes its own into a file in memory, waits for the others
and reads theirs. All add in the order of the ranks, so all get the same bits.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
ROOMS = 2  # of each worker: one is written while others may still read the one before
SLICE = 2**16  # numbers that are added at once: they stay in a core's cache
_FLOAT = 4  # bytes


class SharedGradients(nn.Module):
    """A student whose gradients are averaged over the workers by `add_up`, after the last backward
    pass of a step. Its buffers stay each worker's own, as in DDP here.
    """

    def __init__(self, student: nn.Module, rooms: Tensor, workers: int) -> None:
        """Sends rank 0's weights and buffers to all; `rooms` is what `mapped` gives."""
        super().__init__()
        self.module, self.workers = student, workers
        self._rooms, self._turn = rooms, 0
        self._learnt = learnt(student)
        self._sum = torch.empty(rooms.shape[-1])
        self._views = _views(self._sum, self._learnt)
        for tensor in (*student.parameters(), *student.buffers()):
            dist.broadcast(tensor.detach(), src=0)

    def forward(self, *arguments: Any) -> Any:
        """What the student answers."""
        return self.module(*arguments)

    @torch.no_grad()
    def add_up(self) -> None:
        """Replaces each gradient by its mean over the workers, which all must call together.

        A room is written again two turns later. By then its readers have come to the meeting of the
        turn between, so nobody reads what is being written.
        """
        rooms, rank = self._rooms[self._turn % ROOMS], dist.get_rank()
        self._turn += 1
        mine = _views(rooms[rank], self._learnt)
        gradients = [p.grad for p in self._learnt]
        for view, gradient in zip(mine, gradients, strict=True):
            if gradient is None:  # a parameter that this worker did not use
                view.zero_()
            else:
                view.copy_(gradient)
        dist.all_reduce(torch.zeros(1))  # a meeting; gloo's own barrier takes several messages
        for start in range(0, len(self._sum), SLICE):
            part = slice(start, start + SLICE)
            total = torch.add(rooms[0, part], rooms[1, part], out=self._sum[part])
            for other in range(2, self.workers):
                total += rooms[other, part]
            total /= self.workers
        for parameter, view in zip(self._learnt, self._views, strict=True):
            parameter.grad = view


def learnt(student: nn.Module) -> list[nn.Parameter]:
    """The parameters that have gradients."""
    return [p for p in student.parameters() if p.requires_grad]


def mapped(student: nn.Module, workers: int) -> Tensor | None:
    """Zeros `[ROOMS, workers, numbers]` in memory that all workers map, with room for the gradients
    of a student; None, on all alike, where they cannot: they are on several machines, the memory is
    full, or a gradient is not float32 in one piece.

    Its file has no name any more when this returns, so nothing is left behind.
    """
    parameters = learnt(student)
    fits = all(p.dtype == torch.float32 and _in_one_piece(p) for p in parameters)
    numbers = sum(p.numel() for p in parameters)
    size = ROOMS * workers * numbers
    with _file(size * _FLOAT if fits and numbers else 0) as name:
        rooms = None
        with suppress(OSError, RuntimeError):
            if name and _readable(name):
                rooms = torch.from_file(name, shared=True, size=size, dtype=torch.float32)
        everywhere = torch.tensor([float(rooms is not None)])
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    if rooms is None or not everywhere.item():
        return None
    return rooms.view(ROOMS, workers, numbers)


@contextmanager
def _file(size: int) -> Iterator[str]:
    """The path of a file of so many bytes in memory, with a random end, made by rank 0 and told to
    all; empty where it cannot be made. It is gone at the end.
    """
    told: list[str] = [""]
    if dist.get_rank() == 0 and size:
        with suppress(OSError, AttributeError):  # no such folder, no room, or no such call here
            descriptor, path = mkstemp(prefix=f"gradients-{secrets.token_hex(8)}-", dir=MEMORY)
            try:
                # All of it now: what has no room later would end the process.
                os.posix_fallocate(descriptor, 0, size)
                told = [path]
            except OSError:
                os.unlink(path)
            finally:
                os.close(descriptor)
    try:
        dist.broadcast_object_list(told, src=0)
        yield told[0]
    finally:
        if dist.get_rank() == 0 and told[0]:
            os.unlink(told[0])


def _readable(name: str) -> bool:
    """Whether this worker sees rank 0's file: its name is random, so no other one has it."""
    return os.access(name, os.R_OK | os.W_OK)


def _in_one_piece(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _views(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Parts of a flat tensor in the shapes and strides of parameters, one after the other."""
    views, start = [], flat.storage_offset()
    for parameter in parameters:
        views.append(flat.as_strided(parameter.shape, parameter.stride(), start))
        start += parameter.numel()
    return views
