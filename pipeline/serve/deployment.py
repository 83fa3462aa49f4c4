"""The application on Ray Serve: replicas of the model that take batches, and one that answers.

Requests arrive at the replica of `app.py`, which checks, reads and decodes them. Prepared images go
on to the replicas of the model, where Ray Serve makes batches of what comes within a few
milliseconds. So decoding takes CPUs, the model its GPUs, and each has as many as it needs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config.use import Serve
from pipeline.driver.ray_internals import serve_on_loopback
from pipeline.embed.embedders import Embedder, EmbedderSpec, open_embedder, prepared
from pipeline.images.decode import UInt8Array
from pipeline.images.value_range import FULL, from_json
from pipeline.serve.app import ModelFacts, Site, build_app
from pipeline.serve.intake import Limits, Pixels
from pipeline.serve.looks import drawn, looks_of
from pipeline.serve.opening import Served, opened
from pipeline.serve.token import Gate, is_loopback

APPLICATION, MODEL = "raydino", "model"
QUIET = {"enable_access_log": False, "log_level": "WARNING"}  # not a line for each request
SLACK = 64  # requests beside those for the model: thumbnails, rows, refusals


@dataclass(frozen=True)
class Replicas:
    """Replicas of the model, and what each of them has.

    `local` says that Ray was started on this machine for this job, so that nothing of it listens
    elsewhere.
    """

    count: int
    cpus: int
    gpus: float
    local: bool


def application(settings: Serve, served: Served, token: str, replicas: Replicas) -> Any:
    """What `serve.run` takes.

    Args:
        settings: with the port that is listened at.
        served: what was checked.
        token: "": none is asked for.
        replicas: of the model.
    """
    from ray import serve

    needs_model = served.spec is not None
    bound = []
    if served.spec is not None:
        model = serve.deployment(
            _batching(settings, replicas),
            name=MODEL,
            num_replicas=replicas.count,
            max_ongoing_requests=settings.queue * settings.readers,
            ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
            logging_config=QUIET,
        )
        bound.append(model.bind(served.spec))

    def in_replica() -> Any:
        if replicas.local:
            serve_on_loopback()
        handle = serve.get_deployment_handle(MODEL, APPLICATION) if needs_model else None
        site = _site(settings, served, token, handle)
        return build_app(site, site.model.start if isinstance(site.model, ServedModel) else None)

    front = serve.deployment(
        serve.ingress(in_replica)(),
        name="site",
        num_replicas=settings.readers,
        max_ongoing_requests=settings.queue + SLACK,
        max_queued_requests=settings.queue + SLACK,  # then Ray Serve refuses with 503 itself
        ray_actor_options={"num_cpus": 0},
        logging_config=QUIET,
    )
    return front.bind(*bound)


def _site(settings: Serve, served: Served, token: str, handle: Any) -> Site:
    limits = Limits(
        max_bytes=int(settings.max_mb * 1e6),
        max_pixels=settings.max_pixels,
        max_k=settings.max_k,
        timeout_s=settings.timeout_s,
    )
    facts = served.vectors.facts if served.vectors else {}
    channels = len(served.spec.mean) if served.spec else len(facts["mean"])
    of_model = served.spec.value_range if served.spec else FULL
    value_range = from_json(facts.get("value_range")) or of_model
    return Site(
        gate=Gate(token, settings.port, is_loopback(settings.host)),
        limits=limits,
        queue=settings.queue,
        pixels=Pixels(channels, value_range),
        collection=opened(served.vectors, served.decisions) if served.vectors else None,
        model=ServedModel(served.spec, handle) if served.spec else None,
    )


def facts_of(embedder: Embedder) -> ModelFacts:
    """What the page and the answers say of a model."""
    return ModelFacts(
        name=embedder.spec.name,
        dim=embedder.dim,
        size=embedder.size,
        patches=embedder.grid,
        looks=looks_of(embedder),
    )


class ServedModel:
    """The replicas of the model, as `app.Model`."""

    def __init__(self, spec: EmbedderSpec, handle: Any) -> None:
        self._handle, self._kind = handle, spec.kind
        self.facts = ModelFacts(spec.name, 0, 0)

    async def start(self) -> None:
        """Asks a replica what its model is."""
        self.facts = await self._handle.facts.remote()

    def prepare(self, pixels: UInt8Array) -> UInt8Array:
        """As `app.Model`; as the embedder of a replica would, whose size is known here."""
        return prepared(self._kind, self.facts.size, pixels)

    async def embed(self, image: UInt8Array, want: str) -> np.ndarray[Any, Any]:
        """As `app.Model`."""
        vectors: np.ndarray[Any, Any] = await self._handle.embed.remote(image, want)
        return vectors

    async def look(self, image: UInt8Array, what: str) -> UInt8Array:
        """As `app.Model`."""
        picture: UInt8Array = await self._handle.look.remote(image, what)
        return picture


def _batching(settings: Serve, replicas: Replicas) -> type:
    """The class of the model's replicas; its batches are sizes of the config."""
    from ray import serve

    batch_size, wait_s = settings.batch_size, settings.batch_wait_ms / 1000

    class Model:
        def __init__(self, spec: EmbedderSpec) -> None:
            if replicas.local:
                serve_on_loopback()
            self.embedder = open_embedder(spec, replicas.gpus > 0, replicas.cpus)
            self.one_at_a_time = asyncio.Lock()

        def facts(self) -> ModelFacts:
            return facts_of(self.embedder)

        async def embed(self, image: UInt8Array, want: str) -> np.ndarray[Any, Any]:
            vectors: np.ndarray[Any, Any] = await self._outputs((image, want))
            return vectors

        @serve.batch(  # type: ignore[untyped-decorator]
            max_batch_size=batch_size,
            batch_wait_timeout_s=wait_s,
        )
        async def _outputs(self, requests: list[tuple[UInt8Array, str]]) -> list[Any]:
            """One forward pass for all that wait, whatever they want of it."""
            images = [image for image, _ in requests]
            names = sorted({want for _, want in requests})
            async with self.one_at_a_time:  # the event loop stays free to collect the next batch
                outputs = await asyncio.to_thread(self.embedder.outputs, images, names)
            return [outputs[want][i] for i, (_, want) in enumerate(requests)]

        async def look(self, image: UInt8Array, what: str) -> UInt8Array:
            async with self.one_at_a_time:
                return await asyncio.to_thread(drawn, self.embedder, image, what)

    return Model
