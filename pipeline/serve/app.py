"""All addresses of the endpoint, and what each of them answers.

An application of ASGI that knows no Ray: it gets the set and the model as objects. Answers are
JSON or pictures; whatever is refused is `{"error": sentence}` with the status that fits.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pipeline.images.bad_image import MAX_PIXELS, BadImage
from pipeline.images.decode import UInt8Array, image_format
from pipeline.images.shown import png
from pipeline.serve.collection import Collection
from pipeline.serve.guard import HANDLERS, guarded
from pipeline.serve.intake import (
    JSON,
    Limits,
    Pixels,
    decoded,
    image_of,
    media_type,
    neighbours,
    query_of,
    read_body,
)
from pipeline.serve.lingering import lingering
from pipeline.serve.refusal import Refusal, busy, of_bad_image
from pipeline.serve.thumbnails import SIZES, Cache, thumbnail
from pipeline.serve.token import Gate

log = logging.getLogger("pipeline.serve")

PAGE = Path(__file__).parent / "page"
FILES = {
    "page.css": (PAGE / "page.css", "text/css"),
    "report.css": (PAGE.parents[1] / "report" / "report.css", "text/css"),
    "wall.js": (PAGE / "wall.js", "text/javascript"),
    "detail.js": (PAGE / "detail.js", "text/javascript"),
    "page.js": (PAGE / "page.js", "text/javascript"),
    "icon.svg": (PAGE / "icon.svg", "image/svg+xml"),
}
# What a stranger's file could do as a page of ours: nothing.
IMAGE_POLICY = "default-src 'none'; sandbox"
# An image never changes under its id; it is kept by this browser only.
KEPT = "private, max-age=86400, immutable"
DEFAULT_K = 20
CACHE_BYTES = 128 * 2**20
# Formats that browsers show; others are offered as files.
TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "GIF": "image/gif",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "AVIF": "image/avif",
}


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model.

    Attributes:
        name: for people.
        dim: width of its vectors.
        size: side of the square that it sees, pixels.
        patches: rows and columns of its grid of patches; 0: it has none.
        looks: pictures that it can draw of an image: attention, components.
    """

    name: str
    dim: int
    size: int
    patches: tuple[int, int] = (0, 0)
    looks: tuple[str, ...] = ()


class Model(Protocol):
    """What embeds and looks; anywhere, with any number of requests at once."""

    facts: ModelFacts

    def prepare(self, pixels: UInt8Array) -> UInt8Array:
        """A decoded image [H, W, C] as [S, S, C], as the vectors' own images were prepared."""

    async def embed(self, image: UInt8Array, want: str) -> np.ndarray[Any, Any]:
        """A prepared image [S, S, C] to `cls` [D] or `patches` [P, D]."""

    async def look(self, image: UInt8Array, what: str) -> UInt8Array:
        """A picture [H, W, 3] of what the model sees in a prepared image."""


@dataclass(frozen=True)
class Site:
    """All that answers need: what is None is not served."""

    gate: Gate
    limits: Limits
    queue: int
    pixels: Pixels
    collection: Collection | None = None
    model: Model | None = None


def build_app(site: Site, start: Callable[[], Awaitable[None]] | None = None) -> ASGIApp:
    """The application; `start` is awaited before the first request."""
    answers = _Answers(site)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if start is not None:
            await start()
        yield

    routes = [
        Route("/", answers.page),
        Route("/page/{name}", answers.file),
        Route("/healthz", answers.health),
        Route("/session", answers.session, methods=["POST"]),
        Route("/set", answers.about_set),
        Route("/rows", answers.rows),
        Route("/image/{image_id}", answers.image),
        Route("/embed", answers.embed, methods=["POST"]),
        Route("/search", answers.search, methods=["POST"]),
        Route("/look/{what}", answers.look_at_body, methods=["POST"]),
        Route("/look/{what}/{image_id}", answers.look),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers=HANDLERS,
    )
    return lingering(guarded(app, site.gate), site.limits.timeout_s)


class _Answers:
    """One method for each address."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.thumbnails = Cache(CACHE_BYTES)
        self.waiting = 0
        self.decoding = asyncio.Semaphore(os.cpu_count() or 1)  # each may take 150 MB

    # ---- The page, and what it is told.

    async def page(self, request: Request) -> Response:
        return Response((PAGE / "index.html").read_bytes(), media_type="text/html; charset=utf-8")

    async def file(self, request: Request) -> Response:
        path, kind = FILES.get(request.path_params["name"], (None, ""))
        if path is None:
            raise Refusal(404, "the page has no such file")
        return Response(path.read_bytes(), media_type=kind)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def session(self, request: Request) -> Response:
        """The cookie, for whoever came in with the token."""
        return Response(status_code=204, headers={"Set-Cookie": self.site.gate.cookie()})

    async def about_set(self, request: Request) -> Response:
        site, collection, model = self.site, self.site.collection, self.site.model
        said: dict[str, Any] = {
            "count": len(collection) if collection else 0,
            "groupings": [g.summary() for g in collection.groupings.values()] if collection else [],
            "images": collection is not None and collection.image is not None,
            "model": asdict(model.facts) if model else None,
            "max_bytes": site.limits.max_bytes,
            "max_k": site.limits.max_k,
        }
        return JSONResponse(said)

    async def rows(self, request: Request) -> Response:
        collection = self._collection()
        query = request.query_params
        start, count = _whole(query.get("start", "0")), _whole(query.get("count", "100"))
        by = query.get("by", next(iter(collection.groupings)))
        return JSONResponse({"rows": collection.page(by, start, count)})

    # ---- Images of the set.

    async def image(self, request: Request) -> Response:
        row = self._collection().row_of(request.path_params["image_id"])
        size = request.query_params.get("size")
        if size is None:
            encoded = await asyncio.to_thread(self._encoded, row)
            kind = TYPES.get(_format(encoded))
            headers = {"Cache-Control": KEPT, "Content-Security-Policy": IMAGE_POLICY}
            if kind is None:
                headers["Content-Disposition"] = "attachment"
            return Response(encoded, media_type=kind or "application/octet-stream", headers=headers)
        pixels = _whole(size)
        if pixels not in SIZES:
            raise Refusal(422, f"size must be from {SIZES[0]} to {SIZES[-1]} pixels")
        small = await asyncio.to_thread(
            self.thumbnails.get, (row, pixels), lambda: self._thumbnail(row, pixels)
        )
        return Response(small, media_type="image/jpeg", headers={"Cache-Control": KEPT})

    def _thumbnail(self, row: int, size: int) -> bytes:
        encoded = self._encoded(row)
        try:
            return thumbnail(encoded, size, self.site.pixels, MAX_PIXELS)
        except BadImage as error:
            raise of_bad_image(error) from error

    def _encoded(self, row: int) -> bytes:
        image = self._collection().image
        if image is None:
            raise Refusal(404, "the shards of the images cannot be reached; only vectors are here")
        return image(row)

    # ---- What the model is needed for.

    async def embed(self, request: Request) -> Response:
        model, want = self._model(), request.query_params.get("output", "cls")
        if want not in ("cls", "patches"):
            raise Refusal(422, f"output must be cls or patches, not {want[:50]!r}")
        if want == "patches" and not model.facts.patches[0]:
            raise Refusal(422, f"{model.facts.name} has no patches; ask for output=cls")
        async with self._queued():
            values = await model.embed(await self._sent_image(request), want)
        said: dict[str, Any] = {"model": model.facts.name, "dim": model.facts.dim}
        if want == "patches":
            said["grid"] = model.facts.patches
        return JSONResponse(said | {want: values.tolist()})

    async def search(self, request: Request) -> Response:
        collection, limits = self._collection(), self.site.limits
        if media_type(request.headers.get("content-type", "")) == JSON:
            query = query_of(await self._body(request), limits, DEFAULT_K)
            row = collection.row_of(query.image_id)
            nearest = await asyncio.to_thread(collection.like_row, row, query.k)
            return JSONResponse({"query": collection.about(row), "neighbours": nearest})
        k = neighbours(request.query_params.get("k", DEFAULT_K), limits)
        async with self._queued():
            vector = await self._model().embed(await self._sent_image(request), "cls")
        nearest = await asyncio.to_thread(collection.like, vector, k)
        return JSONResponse({"query": None, "neighbours": nearest})

    async def look(self, request: Request) -> Response:
        row = self._collection().row_of(request.path_params["image_id"])
        what = self._kind_of_look(request)
        async with self._queued():
            encoded = await asyncio.to_thread(self._encoded, row)
            return await self._picture(await self._prepared(encoded, MAX_PIXELS), what)

    async def look_at_body(self, request: Request) -> Response:
        what = self._kind_of_look(request)
        async with self._queued():
            return await self._picture(await self._sent_image(request), what)

    def _kind_of_look(self, request: Request) -> str:
        what, facts = str(request.path_params["what"]), self._model().facts
        if what not in facts.looks:
            raise Refusal(404, f"{facts.name} draws {' and '.join(facts.looks) or 'nothing'}")
        return what

    async def _picture(self, image: UInt8Array, what: str) -> Response:
        """Not kept, not even of an image of the set: it is the model's, which may be another."""
        picture = await self._model().look(image, what)
        content = await asyncio.to_thread(png, picture)
        return Response(content, media_type="image/png", headers={"Cache-Control": "no-store"})

    # ---- What several of them need.

    def _collection(self) -> Collection:
        if self.site.collection is None:
            raise Refusal(404, "there are no vectors to search; start with vectors=FOLDER")
        return self.site.collection

    def _model(self) -> Model:
        if self.site.model is None:
            raise Refusal(404, "there is no model to embed images with; start with model=NAME")
        return self.site.model

    @asynccontextmanager
    async def _queued(self) -> AsyncIterator[None]:
        """A place in the queue, taken before the body is read."""
        if self.waiting >= self.site.queue:
            raise busy(self.site.queue)
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def _body(self, request: Request) -> bytes:
        length = request.headers.get("content-length")
        return await read_body(length, request.stream(), self.site.limits)

    async def _sent_image(self, request: Request) -> UInt8Array:
        body = await self._body(request)
        image = image_of(request.headers.get("content-type", ""), body)
        return await self._prepared(image, self.site.limits.max_pixels)

    async def _prepared(self, encoded: bytes, max_pixels: int) -> UInt8Array:
        """[S, S, C], as the vectors' own images were prepared."""
        model, pixels = self._model(), self.site.pixels
        async with self.decoding:
            return await asyncio.to_thread(
                lambda: model.prepare(decoded(encoded, max_pixels, pixels))
            )


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Refusal(422, f"expected a whole number, not {text[:20]!r}")
    return int(text)


def _format(encoded: bytes) -> str:
    try:
        return image_format(encoded)
    except BadImage:
        return ""
