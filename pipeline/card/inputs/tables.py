"""One pass of each network over each set: the tables of vectors that all scores are read from."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.card.inputs.networks import Network
from pipeline.card.inputs.sets import Sets
from pipeline.embed.embedders import BLOCKS, EmbedderSpec, open_embedder
from pipeline.embed.folder import remove_vectors
from pipeline.embed.ids import Ids, id_bytes
from pipeline.embed.image_reader import ImageReader
from pipeline.embed.run import Request, embed_set
from pipeline.embed.vectors import VectorSet, open_vectors
from pipeline.errors import DataError, PipelineError
from pipeline.heartbeat import now
from pipeline.uri import Place, join

log = logging.getLogger("pipeline.evaluate")


@dataclass(frozen=True)
class Tables:
    """The vectors of one network, of the images that all networks have.

    Attributes:
        network: whose they are.
        reference: of the set that votes.
        queries: of the set that is asked; None: the reference is.
        bad: images that it could not embed, of both sets.
        seconds: that embedding took.
    """

    network: Network
    reference: VectorSet
    queries: VectorSet | None
    bad: int
    seconds: float

    @property
    def each(self) -> dict[str, VectorSet]:
        """The tables by what they are for."""
        asked = {} if self.queries is None else {"queries": self.queries}
        return {"reference": self.reference, **asked}

    def with_set(self, what: str, vectors: VectorSet) -> Tables:
        """With another table of one set."""
        if what == "reference":
            return replace(self, reference=vectors)
        return replace(self, queries=vectors)


@dataclass(frozen=True)
class Embedding:
    """How sets are embedded.

    Attributes:
        folder: of the tables.
        outputs: that scores of models need; those that a network has not are left out.
        beside: outputs that need no model, computed in the first pass.
        max_pixels: larger images are refused.
        gpu: GPUs may be used.
    """

    folder: Place
    outputs: tuple[str, ...]
    beside: tuple[str, ...]
    max_pixels: int
    gpu: bool


def embedded(
    networks: Sequence[Network], sets: Sets, how: Embedding
) -> tuple[list[Tables], list[str]]:
    """The tables of all networks, and a sentence on each network and image that is left out.

    Raises:
        PipelineError: a model cannot be opened, or embeds no image. A baseline that cannot be
            opened is left out.
    """
    tables: list[Tables] = []
    said: list[str] = []
    for number, network in enumerate(networks):
        now(f"evaluate: vectors of {network.name}")
        asked_outputs = how.outputs if network.role == "model" else ("cls",)
        there = {name for one in tables for name in one.reference.outputs}
        asked_outputs += tuple(name for name in how.beside if name not in there)
        try:
            outputs = _outputs(network.spec, asked_outputs)
            tables.append(_embedded(network, number, sets, outputs, how))
        except PipelineError as error:  # model.init may be gone by now; the rest is still a card
            if network.role == "model":
                raise
            said.append(f"{network.name} is not scored: {error.what}")
            log.warning("%s", said[-1])
    return tables, said


def _embedded(
    network: Network, number: int, sets: Sets, outputs: tuple[str, ...], how: Embedding
) -> Tables:
    begin = time.monotonic()
    reports = {}
    for what, one in sets.each.items():
        assert one.shards is not None
        shards = replace(one.shards, value_range=network.spec.value_range)
        request = Request(network.spec, shards, outputs, max_pixels=how.max_pixels, gpu=how.gpu)
        place = place_of(how.folder, number, network, what)
        reports[what] = embed_set(request, place, replaced=True)
    vectors = {what: report.vectors for what, report in reports.items()}
    bad = sum(report.bad for report in reports.values())
    seconds = time.monotonic() - begin
    return Tables(network, vectors["reference"], vectors.get("queries"), bad, seconds)


def place_of(folder: Place, number: int, network: Network, what: str) -> str:
    """Where the table of a set is, by the number of the network on the card."""
    return str(join(folder, f"{number:02}-{network.role}", what))


def images_of(folder: Place, first: Network, sets: Sets) -> list[ImageReader]:
    """Readers of the encoded images of the sets, by the tables of the first network."""
    readers = []
    for what, one in sets.each.items():
        if one.shards is not None:
            vectors = open_vectors(place_of(folder, 0, first, what))
            ids = Ids(id_bytes(vectors.columns("image_id")["image_id"]))
            readers.append(ImageReader(one.shards, ids, vectors.places()))
    return readers


def _outputs(spec: EmbedderSpec, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those outputs that a model has; asks a task where more than the CLS is wanted."""
    if set(wanted) <= {"cls"}:
        return tuple(wanted)
    import ray

    task = ray.remote(_has_outputs).options(num_cpus=0.5)
    return tuple(ray.get(task.remote(spec, tuple(wanted))))


def _has_outputs(spec: EmbedderSpec, wanted: Sequence[str]) -> list[str]:
    embedder = open_embedder(spec)
    there = []
    for name in wanted:
        try:
            embedder.outputs([], (name,), BLOCKS)
        except DataError:
            continue
        there.append(name)
    return there


def of_vectors(network: Network, sets: Sets) -> Tables:
    """The tables where vectors were given."""
    reference = sets.reference.vectors
    assert reference is not None
    queries = None if sets.queries is None else sets.queries.vectors
    return Tables(network, reference, queries, bad=0, seconds=0.0)


def remove_baselines(tables: Sequence[Tables]) -> None:
    """Takes away the vectors of networks that are of no more use: those of random weights."""
    for one in tables:
        if one.network.role != "model":
            for vectors in one.each.values():
                remove_vectors(vectors.uri)
