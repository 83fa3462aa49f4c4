"""Checkpoints: how long a step waits for one, and how a group of workers gets its state back.

    python benchmarks/restart.py write            # ViT-S/16, one process
    python benchmarks/restart.py restart 2 4 8    # groups of so many gloo ranks on this machine

Each is measured against the way before (version 4): `torch.save`, flush, and a checksum of what was
written, while the step waits; and at a start every rank reads and unpickles the whole file, rank 0
first. Files come from the page cache, so the seconds are those of CPU and memory; what storage has
to deliver is given in bytes. Rounds in turn; medians, smallest to largest.
"""

import json
import os
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.model.groups import parameter_groups
from pipeline.model.pair import HeadSpec, build_pair
from pipeline.model.vit import BackboneSpec
from pipeline.train.checkpoint import restore, saving
from pipeline.train.checkpoint.names import optimizer_names, prepare_optimizer
from pipeline.train.checkpoint.state import Saved
from pipeline.train.objective import Objective, ObjectiveSpec
from pipeline.train.parallel.strategy import Layout, prepare
from pipeline.train.start import TrainState

ROUNDS = 3
CPU = torch.device("cpu")


def held(depth: int, prototypes: int, layout: Layout) -> TrainState:
    """Student, teacher and moments of a ViT of S's width, as a rank holds them."""
    head = HeadSpec(prototypes=prototypes)
    pair = build_pair(BackboneSpec(width=384, depth=depth, heads=6), head, None, seed=0)
    objective = Objective.for_pair(ObjectiveSpec(), pair)
    prepare(pair, layout)
    optimizer = torch.optim.AdamW(parameter_groups(pair.student))
    prepare_optimizer(optimizer, set(optimizer_names(optimizer)))
    return TrainState(pair, objective, optimizer)


def version4(folder: Path, train_state: TrainState) -> Saved:
    """Writes a checkpoint as version 4 did."""
    place = folder / "step-00000001"
    place.mkdir(parents=True, exist_ok=True)
    state = train_state.state() | {"optimizer": train_state.optimizer.state_dict()}
    with (place / "state.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    checksum = 0
    with (place / "state.pt").open("rb") as file:
        while part := file.read(2**24):
            checksum = zlib.crc32(part, checksum)
    meta = {"step": 1, "version": 4, "bytes": (place / "state.pt").stat().st_size}
    meta["crc32"] = checksum
    (place / "meta.json").write_text(json.dumps(meta))
    return Saved(place, meta)


def said(seconds: list[float]) -> str:
    low, high = min(seconds), max(seconds)
    return f"{statistics.median(seconds):.2f} s ({low:.2f} to {high:.2f})"


def write(folder: Path) -> None:
    torch.set_num_threads(1)
    train_state = held(12, 65536, Layout(1, CPU))
    work = torch.randn(700, 700)

    def busy(until: Any = None) -> float:
        """Products a second, for two seconds or as long as a checkpoint is written."""
        begin, count = time.perf_counter(), 0
        while until() if until else time.perf_counter() < begin + 2:
            work @ work
            count += 1
        return count / max(1e-9, time.perf_counter() - begin)

    before, stall, whole, slower = [], [], [], []
    writing = saving.Saving(folder / "new")
    for number in range(ROUNDS + 1):
        begin = time.perf_counter()
        size = version4(folder / "old", train_state).meta["bytes"]
        before.append(time.perf_counter() - begin)
        alone = busy()
        begin = time.perf_counter()
        writing.begin(number, train_state.state(), {})
        stall.append(time.perf_counter() - begin)
        meanwhile = busy(lambda: writing.thread is not None and writing.thread.is_alive())
        ended = writing.ended(wait=True)
        assert ended is not None and not ended.error, ended
        whole.append(time.perf_counter() - begin)
        slower.append(meanwhile / alone)
    print(f"checkpoint {size / 2**20:,.0f} MiB; host copy {writing.host.bytes / 2**20:,.0f} MiB")
    print(f"before: the step waits  {said(before[1:])}")
    print(f"now: the step waits     {said(stall[1:])}, the first time {stall[0]:.2f} s")
    print(f"     until it is whole  {said(whole[1:])}, in a thread beside one that computes")
    speed = ", ".join(f"{x:.2f}" for x in sorted(slower))
    print(f"     steps meanwhile, of their speed alone: {speed}")


def rank_of(rank: int, ranks: int, folder: str, strategy: Any) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{ranks}-{strategy}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    layout = Layout(ranks, CPU, strategy=strategy)
    train_state = held(6, 4096, layout)
    group = saving.writers(layout.sharded)
    new = Path(folder) / f"new-{ranks}-{strategy}"
    if rank == 0 or layout.sharded:
        writing = saving.Saving(new, group)
        writing.begin(1, train_state.state(), {})
        writing.ended(wait=True)
    old = Saved(Path(folder) / "old" / "step-00000001", {})
    meta = json.loads((Path(old.path) / "meta.json").read_text())
    times: dict[str, list[float]] = {"before": [], "now": []}
    read = 0
    for _ in range(ROUNDS):
        if strategy == "ddp":
            dist.barrier()
            begin = time.perf_counter()
            for turn in (True, False):
                if (rank == 0) == turn:
                    tensors = Saved(old.path, meta).load()
                dist.barrier()
            train_state.restore(tensors)
            del tensors
            dist.barrier()
            times["before"].append(time.perf_counter() - begin)
        dist.barrier()
        begin = time.perf_counter()
        source = restore.newest(new, layout.sharded)
        assert source is not None
        source.into(train_state, CPU)
        dist.barrier()
        times["now"].append(time.perf_counter() - begin)
        read = source.bytes_read
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, read)
    if rank == 0:
        if strategy == "ddp":
            size = ranks * meta["bytes"]
            print(f"{ranks} ranks, before: {said(times['before'])}, read {size / 2**20:,.0f} MiB")
        print(
            f"{ranks} ranks, {strategy}: {said(times['now'])}, read {sum(every) / 2**20:,.0f} MiB",
            flush=True,
        )
    dist.barrier()


def main() -> None:
    what, *ranks = sys.argv[1:] or ["write"]
    print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        if what == "write":
            write(Path(folder))
            return
        version4(Path(folder) / "old", held(6, 4096, Layout(1, CPU)))
        for count in map(int, ranks or ["2"]):
            for strategy in ("ddp", "fsdp"):
                mp.spawn(rank_of, (count, folder, strategy), nprocs=count)


if __name__ == "__main__":
    main()
