"""Checkpoints while training goes on: copied at once, written by a thread.

A step waits for the copy into host memory, which is pinned where there is a GPU, and for nothing
else. The copy is as large as what this rank writes, and is kept from one checkpoint to the next.
Of several ranks that write, each has a thread; the threads agree in a group of their own (gloo), so
that `meta.json` comes when every file is there. If a rank dies meanwhile, the group breaks, the
write has failed, and what lies there is never listed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from pipeline.errors import one_line
from pipeline.train.checkpoint import files
from pipeline.train.checkpoint.names import divided
from pipeline.train.checkpoint.state import VERSION, place_of
from pipeline.train.checkpoint.writer import Writer, planner_of
from pipeline.uri import Place

SLAB = 2**28  # bytes that are pinned at once: pinning rounds up to powers of two
ALIGNED = 64
GIVE_UP_S = 3600.0  # a rank that does not answer so long while others have written is lost


@dataclass(frozen=True)
class Written:
    """How the write of a checkpoint ended."""

    step: int
    error: str = ""  # one line; "" where the checkpoint is complete


@dataclass
class _Order:
    """What a thread is to write."""

    step: int
    meta: dict[str, Any]
    after: Callable[[], None]


class HostCopy:
    """This rank's parts in host memory, in slabs that are kept; `resolve_data` as a planner's."""

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []
        self.parts: dict[MetadataIndex, Tensor] = {}
        self.shapes: list[Any] = []

    @property
    def bytes(self) -> int:
        """Host memory that it holds."""
        return sum(slab.numel() for slab in self.slabs)

    def take(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Copies what the plan asks for; returns when it is in host memory."""
        # only tensors: numbers were taken out before
        tensors = {item.index: cast(Tensor, planner.resolve_data(item)) for item in plan.items}
        shapes = [(index, x.shape, x.dtype) for index, x in tensors.items()]
        if shapes != self.shapes:
            self._make(tensors)
            self.shapes = shapes
        for index, tensor in tensors.items():
            self.parts[index].copy_(tensor.detach(), non_blocking=True)
        if _has_gpu():
            torch.cuda.current_stream().synchronize()

    def resolve_data(self, item: Any) -> Tensor:
        """The copy of what a planner would give."""
        return self.parts[item.index]

    def _make(self, tensors: Mapping[MetadataIndex, Tensor]) -> None:
        self.parts, free = {}, iter(self.slabs)
        slab, used = next(free, None), 0
        for index, tensor in tensors.items():
            size = tensor.nbytes
            while slab is None or used + size > slab.numel():
                slab, used = next(free, None), 0
                if slab is None:
                    left = sum(x.nbytes for x in tensors.values())
                    slab = _slab(max(size, min(SLAB, left + ALIGNED * len(tensors))))
                    self.slabs.append(slab)
            part = slab[used : used + size]
            self.parts[index] = part.view(tensor.dtype).view(tensor.shape)
            used += size + (-size) % ALIGNED


def _has_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _slab(size: int) -> Tensor:
    if _has_gpu():
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # the system allows no more pinned memory: slower, and right
            pass
    return torch.empty(size, dtype=torch.uint8)


class Saving:
    """Writes the checkpoints of a run, one after the other. Every rank that writes has one, and
    takes the same turns with it.

    Attributes:
        host: the copy that is written.
    """

    def __init__(self, folder: Place, group: dist.ProcessGroup | None = None) -> None:
        """Args: the `checkpoints` folder, and the ranks that write, where there are several."""
        self.folder, self.group = folder, group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.host = HostCopy()
        self.plan: SavePlan | None = None
        self.plans: list[SavePlan] = []  # of all ranks, on the first
        self.metadata = Metadata({})
        self.planned: list[Any] = []
        self.order: _Order | None = None
        self.thread: threading.Thread | None = None
        self.end: Written | BaseException | None = None
        self.failed = False  # whether the last one could not be written

    @property
    def busy(self) -> bool:
        """Whether a write is under way, or its end was not asked for yet."""
        return self.thread is not None

    def begin(
        self,
        step: int,
        state: Mapping[str, Any],
        meta: dict[str, Any],
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Copies a state and begins to write it. `ended` must have said how the last one ended.

        Args:
            step: steps done.
            state: nested dicts of tensors and numbers.
            meta: JSON values for `meta.json`.
            after: done by the thread of the first rank when the checkpoint is complete.
        """
        if self.thread is not None:
            raise RuntimeError("a checkpoint is being written; ask `ended` for its end first")
        tensors, numbers = divided(state)
        planner = planner_of(tensors, self.rank == 0)
        self._plan(planner, tensors)
        assert self.plan is not None  # `_plan` made it
        self.host.take(self.plan, planner)
        meta = meta | {"step": step, "version": VERSION, "numbers": numbers}
        self.order = _Order(step, meta, after)
        self._start()

    def again(self) -> None:
        """Tries the last one again, from the copy that is still in memory."""
        self._start()

    def ended(self, wait: bool = False) -> Written | None:
        """How the last write ended, once; None where there is nothing to say (yet).

        Raises:
            Exception: what is no failure of storage.
        """
        if self.thread is None or (self.thread.is_alive() and not wait):
            return None
        self.thread.join()
        self.thread = None
        if isinstance(self.end, Written):
            self.failed = bool(self.end.error)
            return self.end
        assert self.end is not None  # the thread sets it
        raise self.end

    def _plan(self, planner: Any, tensors: Mapping[str, Tensor]) -> None:
        """Who writes what; agreed with the others once, and again when a shape has changed, which
        it does on all ranks alike.
        """
        shapes = [(name, x.shape, x.dtype) for name, x in tensors.items()]
        if shapes == self.planned:
            return
        self.planned = shapes
        plans: list[Any] = [planner.create_local_plan()]
        if self.group is not None:
            ranks = dist.get_world_size(self.group)
            gathered: list[Any] | None = [None] * ranks if self.rank == 0 else None
            dist.gather_object(plans[0], gathered, group=self.group, group_dst=0)
            plans = gathered or []
        if self.rank == 0:
            self.plans, self.metadata = planner.create_global_plan(plans)
            plans = self.plans
        mine: list[Any] = [plans[0] if plans else None]
        if self.group is not None:
            dist.scatter_object_list(
                mine, plans if self.rank == 0 else None, group=self.group, group_src=0
            )
        self.plan = planner.finish_plan(mine[0])

    def _start(self) -> None:
        self.end = None
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        assert self.order is not None  # `begin` gave it
        order, place = self.order, place_of(self.folder, self.order.step)
        try:
            try:
                self._write(order, place)
            except BaseException:
                if self.rank == 0:
                    files.abandon(place)
                raise
            if self.rank == 0:
                order.after()
            self.end = Written(order.step)
        except OSError as error:
            self.end = Written(order.step, one_line(error))
        except BaseException as error:
            self.end = error

    def _write(self, order: _Order, place: Place) -> None:
        first = self.rank == 0
        writer = Writer(place, self.rank, dict(order.meta))
        self._together(lambda: writer.prepare_global_plan(self.plans) if first else None)
        results = self._together(
            lambda: writer.write_data(self.plan, self.host).wait()  # type: ignore[arg-type]
        )
        self._together(lambda: writer.finish(self.metadata, list(results)) if first else None)

    def _together(self, act: Callable[[], Any]) -> Sequence[Any]:
        """Does something on all ranks; gives what it gave on each, in order.

        Raises:
            OSError: it failed on some rank.
        """
        if self.group is None:
            return [act()]
        value, error, own = None, "", None
        try:
            value = act()
        except Exception as raised:
            own, error = raised, f"rank {self.rank}: {one_line(raised)}"
        answers: list[Any] = [None] * dist.get_world_size(self.group)
        try:
            dist.all_gather_object(answers, (value, error), group=self.group)
        except RuntimeError as broken:
            raise OSError(f"another worker was lost meanwhile ({one_line(broken)})") from broken
        if own is not None:
            raise own
        if errors := [each for _, each in answers if each]:
            raise OSError("; ".join(errors[:3]))
        return [each for each, _ in answers]


def writers(split: bool) -> dist.ProcessGroup | None:
    """The group of ranks that write, where networks are split over them: all, with threads that
    agree by gloo whatever the device. None where rank 0 writes alone. Every rank calls it.
    """
    if not split or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=GIVE_UP_S))
    return cast(dist.ProcessGroup, group)
