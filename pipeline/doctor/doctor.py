"""The doctor: what this machine is, what the shards hold, and how many images it can feed.

It is no stage of the chain: it leaves nothing behind and needs no Ray, unless RAY_ADDRESS names a
cluster, which is then asked what it has.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.config.config import Config
from pipeline.context import open_packed_shards, result_line, size_of
from pipeline.doctor.checkup import checkup
from pipeline.doctor.gpus import gpu_lines
from pipeline.doctor.surroundings import disk, machine_of, shared_memory, versions
from pipeline.errors import PipelineError
from pipeline.heartbeat import now
from pipeline.images.value_range import sentence
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan
from pipeline.shards.shards import ShardSet
from pipeline.stages.chain import named
from pipeline.storage.places import exists, resolve_uri
from pipeline.storage.run_folder import RunFolder
from pipeline.stream.dealer import AHEAD, BUFFER, IN_FLIGHT, reads_at_once
from pipeline.stream.decoder import StreamSpec
from pipeline.stream.probe import Contents, Sample, Spread, Timing, read_sample, time_sample
from pipeline.stream.reader import UNPACKED_LIMIT
from pipeline.stream.worker import PREFETCH
from pipeline.train.run import plan_for, stream_spec
from pipeline.train.speed.bottleneck import count, ms

log = logging.getLogger("pipeline")

# Of the rate of the bare functions: the rest is Ray's own work (benchmarks/loader.py).
THROUGH_RAY = 0.84
BUSY = 0.8  # share of a core, below which the figures need a word


@dataclass(frozen=True)
class Needs:
    """What decoding needs, by the time of one image."""

    images_per_s: float  # that the plan's decoders give
    cpus_per_1000: float  # decode CPUs for each 1,000 images/s

    @classmethod
    def of(cls, whole_ms: float, decode_tasks: int) -> Needs:
        """From the milliseconds that one core needs for an image, without Ray."""
        one = THROUGH_RAY * 1000 / whole_ms
        return cls(decode_tasks * one, 1000 / one)


@dataclass(frozen=True)
class Memory:
    """Bytes that are on their way from storage to the workers."""

    chunk: int
    portion_encoded: float
    portion_crops: int
    window: float  # a read task holds two

    @classmethod
    def of(cls, plan: Plan, spec: StreamSpec, image_bytes: float, window_images: int) -> Memory:
        """From the mean size of an encoded image."""
        return cls(
            plan.chunk_images * plan.view_bytes,
            spec.portion_images * image_bytes,
            spec.portion_images * plan.view_bytes,
            window_images * image_bytes,
        )

    def object_store(self, plan: Plan) -> float:
        """An estimate for all nodes: portions before decoders, crops behind them and at workers.

        A decoder makes the crops of one portion while those of the one before wait for their turn.
        """
        # streams that share windows have one read task each
        reads = plan.streams if plan.streams > 1 else reads_at_once(plan.decode_tasks)
        readers = reads * 2 * BUFFER * self.portion_encoded
        in_work = IN_FLIGHT * self.portion_encoded
        decoders = plan.decode_tasks * ((1 + AHEAD) * in_work + 2 * self.portion_crops)
        workers = plan.workers * (plan.worker_batch * plan.view_bytes + PREFETCH * self.chunk)
        return readers + decoders + workers


def doctor(config: Config) -> None:
    """Prints what was found, one aligned line a thing.

    Raises:
        PipelineError: for all that would stop a run at its start.
    """
    config = named(config, ["doctor"])
    folder = RunFolder.of(config.run.folder, config.run.name)
    named_set = config.data.shards or config.data.source
    if not named_set and not exists(*resolve_uri(str(folder.at("shards")))):
        _without_shards(config)
        return
    shards = open_packed_shards(config, folder)
    result_line("doctor", versions())
    machine, store = machine_of(config)
    shared_memory(config)
    disk(config.run.folder)
    gpu_lines(config)
    _shards(shards)
    plan = plan_for(_plannable(config, shards.rows), shards, machine)
    spec = stream_spec(plan, shards, store)
    with _one_thread():
        now("reading a sample of the shards")
        sample = read_sample(shards)
        now("timing the decoding of the sample")
        timing, contents = time_sample(sample, spec)
    _images(sample, contents)
    if said := sentence(contents.used_range, shards.columns.value_range):
        result_line("range", said)
    _times(sample, timing, contents, spec)
    _prediction(plan, machine, Needs.of(timing.whole.median, plan.decode_tasks))
    window = plan.window_images if shards.packed else shards.rows
    _memory(plan, spec, Memory.of(plan, spec, sample.image_bytes, window), store)


def _without_shards(config: Config) -> None:
    """What this machine has, and where there are GPUs whether they work.

    Raises:
        PipelineError: something is missing without which no run works.
    """
    import torch

    if torch.cuda.is_available() or os.environ.get("RAY_ADDRESS"):
        gpu_lines(config)
    if not checkup(config):
        raise PipelineError(
            "this machine is not ready for a run", "do what the lines with MISSING say"
        )


def _shards(shards: ShardSet) -> None:
    size, files = sum(file.bytes for file in shards.files), len(shards.files)
    kind = "packed" if shards.packed else "not packed"
    result_line(
        "shards",
        f"{shards.uri}: {shards.rows:,} images in {count(files, 'file')}, {size_of(size)}, {kind}",
    )
    if not shards.packed and size > UNPACKED_LIMIT:
        log.warning("training refuses unpacked sets of more than %s", size_of(UNPACKED_LIMIT))


def _plannable(config: Config, images: int) -> Config:
    """The config with what a plan needs and the doctor does not: a length, a batch that exists."""
    changes: dict[str, int] = {}
    if config.optim.passes is None and config.optim.steps is None:
        changes["steps"] = 1
    if "global_batch_size" not in config.optim.model_fields_set:
        changes["global_batch_size"] = max(1, min(config.optim.global_batch_size, images))
    return config.model_copy(update={"optim": config.optim.model_copy(update=changes)})


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _images(sample: Sample, contents: Contents) -> None:
    megapixels = contents.megapixels
    result_line(
        "images",
        f"{len(sample):,} read, {size_of(sample.image_bytes)} each; "
        f"{100 * contents.plain:.0f} % plain JPEGs; megapixels {megapixels.median:.2g} "
        f"({megapixels.low:.2g} to {megapixels.high:.2g})",
    )
    bad = ", ".join(f"{n} {reason}" for reason, n in sorted(contents.bad.items())) or "none"
    result_line("bad", f"{bad}, of {contents.checked:,} decoded")


def _times(sample: Sample, timing: Timing, contents: Contents, spec: StreamSpec) -> None:
    rate = sample.read_bytes_per_s
    result_line(
        "read",
        f"{_spread(sample.read_ms)}, {rate.median / 1e6:,.0f} MB/s "
        f"({rate.low / 1e6:,.0f} to {rate.high / 1e6:,.0f}), row group by row group",
    )
    result_line("decode", _spread(timing.decode))
    result_line("cut", _spread(timing.cut))
    result_line("draws", f"{_spread(timing.draw)}, with boxes and masks")
    result_line(
        "whole",
        f"{_spread(timing.whole)} of one core: median (lowest to highest), "
        f"{timing.images:,} images again and again",
    )
    if timing.had.median < BUSY:
        log.warning(
            "others use this machine: %.0f %% of a core were left for the timing, which counts "
            "CPU time only; reading counts all",
            100 * timing.had.median,
        )
    if not contents.shrunk:
        result_line("scaled", "no image is large enough to be decoded at 1/2 or less")
        return
    plain, scaled = timing.other_decode.median, timing.decode.median
    if not spec.scaled_decode:
        plain, scaled = scaled, plain
    result_line(
        "scaled",
        f"data.scaled_decode={str(spec.scaled_decode).lower()}; decoding takes {ms(scaled)} ms "
        f"with it and {ms(plain)} without, {100 * contents.shrunk:.2g} % of the images shrink",
    )


def _prediction(plan: Plan, machine: Machine, needs: Needs) -> None:
    tasks = plan.decode_tasks
    shared = ", less what training takes of the same cores" if plan.device == "cpu" else ""
    result_line(
        "rate",
        f"about {needs.images_per_s:,.0f} images/s from {count(tasks, 'decode task')} on "
        f"{count(machine.cpus, 'CPU')} beside {count(plan.workers, f'{plan.device} worker')}"
        f"{shared}",
    )
    result_line(
        "cpus",
        f"for each 1,000 images/s: {needs.cpus_per_1000:.2g} decode CPUs like this one "
        f"({100 - 100 * THROUGH_RAY:.0f} % of them for Ray's own work)",
    )


def _memory(plan: Plan, spec: StreamSpec, memory: Memory, store: float) -> None:
    result_line(
        "memory",
        f"chunk {plan.chunk_images:,} images, {size_of(memory.chunk)}; "
        f"portion {spec.portion_images:,} images, {size_of(memory.portion_encoded)} encoded "
        f"and {size_of(memory.portion_crops)} of crops; "
        f"window {size_of(memory.window)}, two in each read task",
    )
    needed = memory.object_store(plan)
    result_line("store", f"about {size_of(needed)} of the object store's {size_of(store)}")
    if needed > store:
        log.warning(
            "the object store is small for this; a larger one (resources.object_store_gb, or "
            "that of the cluster's nodes) keeps decoders from waiting for room"
        )


def _spread(times: Spread) -> str:
    return f"{ms(times.median)} ms an image ({ms(times.low)} to {ms(times.high)})"
