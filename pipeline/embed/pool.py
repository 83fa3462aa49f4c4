"""Who embeds: one task where there is little to do, else decode tasks and a pool of actors.

All of them cut the same units into the same batches, on one thread of torch where there is no GPU,
so the bytes of a part do not depend on who made it, nor when.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline.embed.embedders import EmbedderSpec, open_embedder
from pipeline.embed.parts import outputs_of, write_part
from pipeline.embed.units import Decoded, Decoding, Unit, decoded_units
from pipeline.embed.vectors import Facts
from pipeline.errors import DataError, PipelineError, last_line
from pipeline.log import only_errors
from pipeline.stream.rows import row_at, row_of

IN_FLIGHT = 3  # units at an actor: one embedded, one written, and the next one
BLOCKS = 10_000  # of what is to be read, at most: Ray's driver counts each; a lost one is redone
CPUS_PER_DECODER = 8  # without a GPU: a core decodes for so many that embed, or more
DECODING = 0.25  # without a GPU: share of the CPUs that Ray counts for decoding

Paced = Iterator[tuple["Pace", int]]


@dataclass(frozen=True)
class Pace:
    """What units took.

    Attributes:
        images: embedded, the bad ones counted too.
        embed_s: the model at work.
        wait_s: the model waiting for decoded images, from its first unit on.
    """

    images: int = 0
    embed_s: float = 0.0
    wait_s: float = 0.0

    def __add__(self, other: Pace) -> Pace:
        return Pace(
            self.images + other.images,
            self.embed_s + other.embed_s,
            self.wait_s + other.wait_s,
        )

    @property
    def waiting(self) -> float:
        """Share of the time that the model waited."""
        return self.wait_s / max(1e-9, self.wait_s + self.embed_s)


@dataclass(frozen=True)
class Assignment:
    """What workers are told beside their units.

    Attributes:
        spec: the model.
        decoding: of the images.
        facts: of the table, see `run.facts_of`.
        folder: of the table.
        gpu: GPUs may be used; as a worker gets it, it has one.
    """

    spec: EmbedderSpec
    decoding: Decoding
    facts: Facts
    folder: str
    gpu: bool


class Embedding:
    """The model of one worker; keeps the time between two units.

    Two units may be with it at once: while one is written, the next is embedded.
    """

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.embedder = open_embedder(assignment.spec, assignment.gpu, threads=1)
        self._lock, self._ended = threading.Lock(), 0.0

    def begin(self) -> None:
        """Counts what the model waits from now on; else from its first unit on."""
        self._ended = time.perf_counter()

    def __call__(self, decoded: Decoded) -> Pace:
        """Embeds a unit and writes its part."""
        with self._lock:
            begin = time.perf_counter()
            wait_s = begin - self._ended if self._ended else 0.0
            outputs = outputs_of(self.embedder, decoded, self.assignment.facts)
            self._ended = time.perf_counter()
            pace = Pace(decoded.unit.rows, self._ended - begin, wait_s)
        write_part(self.assignment.folder, decoded, outputs, self.assignment.facts)
        return pace


# ---- One task.


def embedded_in_one_task(reads: Sequence[Sequence[Unit]], assignment: Assignment) -> Paced:
    """Embeds units one after the other. Yields what they took, and 1, the worker."""
    import ray
    from ray.exceptions import RayTaskError

    gpus = 1 if assignment.gpu and ray.cluster_resources().get("GPU", 0) >= 1 else 0
    task = ray.remote(_embed_all).options(num_cpus=1, num_gpus=gpus)
    try:
        yield ray.get(task.remote(reads, replace(assignment, gpu=bool(gpus)))), 1
    except RayTaskError as error:
        raise as_ours(error) from error


def _embed_all(reads: Sequence[Sequence[Unit]], assignment: Assignment) -> Pace:
    embedding, pace = Embedding(assignment), Pace()
    embedding.begin()
    for units in reads:
        for decoded in decoded_units(units, assignment.decoding):
            pace = pace + embedding(decoded)
    return pace


# ---- A pool.


def embedded_by_pool(reads: Sequence[Sequence[Unit]], assignment: Assignment) -> Paced:
    """Embeds units on all the cluster has. Yields what each took, and the number of actors."""
    import ray
    from ray.exceptions import RayError

    room = _room(sum(map(len, reads)), assignment.gpu)
    common = {"batch_size": None, "batch_format": "pyarrow", "zero_copy_batch": True}
    # Each task is given its own reads: a list of all of them would be read by every task.
    texts = [{"units": json.dumps([asdict(unit) for unit in units])} for units in reads]
    dataset = ray.data.from_items(texts, override_num_blocks=min(len(reads), BLOCKS))
    _configure(dataset.context)
    dataset = dataset.map_batches(
        _Decode(assignment.decoding),
        **common,
        compute=ray.data.TaskPoolStrategy(size=room.decoders),
        num_cpus=room.decoder_cpus,
    ).map_batches(
        _Embed,
        fn_constructor_args=(replace(assignment, gpu=bool(room.actor_gpus)),),
        compute=ray.data.ActorPoolStrategy(
            size=room.actors,
            max_tasks_in_flight_per_actor=IN_FLIGHT,
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        **common,
        num_cpus=room.actor_cpus,
        num_gpus=room.actor_gpus,
    )
    try:
        with only_errors("ray.data"):
            for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in block.to_pylist():
                    yield Pace(row["images"], row["embed_s"], row["wait_s"]), room.actors
    except RayError as error:
        raise as_ours(error) from error


@dataclass(frozen=True)
class Room:
    """Actors and decode tasks, and the CPUs and GPUs of each."""

    actors: int
    actor_cpus: float
    actor_gpus: int
    decoders: int
    decoder_cpus: float


def _room(units: int, gpu: bool) -> Room:
    import ray

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if gpu else 0
    return room_for(int(resources.get("CPU", 1)), gpus, units)


def room_for(cpus: int, gpus: int, units: int) -> Room:
    """An actor for each GPU and a decode task for each other CPU. Without a GPU all CPUs embed:
    decoding is the smaller work there, and shares them.

    Args:
        cpus: of the cluster.
        gpus: of the cluster.
        units: to embed; there are never more actors.
    """
    if gpus:
        actors = min(gpus, units)
        share = 1.0 if cpus > actors else 0.5 * cpus / actors
        left = cpus - share * actors
        decoders = max(1, int(left))
        return Room(actors, share, 1, decoders, min(1.0, left / decoders))
    actors = min(max(1, cpus), units)
    decoders = max(1, cpus // CPUS_PER_DECODER)
    decoder_cpus = math.floor(1000 * cpus * DECODING / decoders) / 1000
    return Room(actors, 1 - DECODING, 0, decoders, min(1.0, decoder_cpus))


class _Decode:
    """From descriptions of units, a read in each row, to the decoded units, a row each."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        import torch

        torch.set_num_threads(1)  # decoders run side by side, one core each
        for text in table.column("units").to_pylist():
            units = [Unit(**{**u, "groups": tuple(u["groups"])}) for u in json.loads(text)]
            for decoded in decoded_units(units, self.decoding):
                head = {name: value for name, value in decoded.__dict__.items() if name != "images"}
                shape = {"shape": decoded.images.shape}
                yield row_of(head | shape, {"images": decoded.images.reshape(-1)})


class _Embed:
    """An actor: from units to what they took."""

    def __init__(self, assignment: Assignment) -> None:
        self.embedding = Embedding(assignment)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        import numpy as np

        for row in range(table.num_rows):
            head, large = row_at(table, row)
            images = np.frombuffer(large["images"], np.uint8).reshape(head.pop("shape"))
            pace = self.embedding(Decoded(images=images, **head))
            columns = {"images": pace.images, "embed_s": pace.embed_s, "wait_s": pace.wait_s}
            yield pa.table({name: [value] for name, value in columns.items()})


def _configure(context: Any) -> None:
    """Of one dataset and what is made of it; the driver's own settings stay as they are."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # one unit, one block
    context.issue_detectors_config.detectors = []


def as_ours(error: Exception, what: str = "embedding") -> PipelineError:
    """What a task said, where it was a user's mistake; else its last line, with the traceback as
    the cause.

    Args:
        error: of Ray.
        what: stopped.
    """
    return mistake_of(error) or DataError(
        f"{what} stopped: {last_line(error)}", "the same command goes on with what is missing"
    )


def mistake_of(error: BaseException) -> PipelineError | None:
    """The user's mistake that a task found; None where it failed for another reason."""
    cause: Any = error
    while cause is not None and not (isinstance(cause, PipelineError) and hasattr(cause, "what")):
        cause = getattr(cause, "cause", None) or cause.__cause__
    return cause
