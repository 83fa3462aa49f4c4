"""Opens what is served: the vectors with their images, and the spec of the model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.embed.embedders import ONNX, EmbedderSpec, embedder_of, open_embedder
from pipeline.embed.vectors import VectorSet, open_vectors
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.search.decisions import Decisions
from pipeline.search.model import check_model, spec_of
from pipeline.search.rows import Rows
from pipeline.search.search import EXACT_ROWS, MEMORY_GIB, open_search
from pipeline.serve.collection import Collection
from pipeline.serve.gallery import by_cluster, by_text, everything, label_texts
from pipeline.uri import public

log = logging.getLogger("pipeline.serve")


@dataclass(frozen=True)
class Served:
    """What the driver has checked, and the replicas open; small, pickled."""

    vectors: VectorSet | None
    spec: EmbedderSpec | None
    decisions: Decisions | None = None


def checked(model: str, vectors: str, decisions: str = "") -> Served:
    """What three fields of the config name.

    Raises:
        PipelineError: nothing is named, a place is empty, or the vectors are another model's.
    """
    if not model and not vectors:
        raise ConfigError(
            "nothing to serve: neither serve.model nor serve.vectors is set",
            "give model=runs/<name>, vectors=runs/<name>/vectors, or both",
        )
    known = open_vectors(vectors, "serve.vectors") if vectors else None
    facts = known.facts if known else {}
    if known and (not known.rows or "cls" not in known.outputs):
        contents = f"{known.rows:,} rows of {', '.join(known.outputs)}"
        raise DataError(
            f"serve.vectors={public(vectors)} has {contents}; expected cls of some images",
            "embed images with embed.outputs=[cls]",
        )
    try:
        spec = spec_of(known, model) if known else embedder_of(model)
    except PipelineError as error:
        if model:
            raise
        spec = None
        log.warning("model       images cannot be sent, only those of the set: %s", error.what)
    if known and spec:
        hint = "name the model that made the vectors, or embed the images again with this one"
        check_model(spec.name, facts, {"digest": spec.digest}, hint)
        prepares = open_embedder(spec) if spec.kind == ONNX else spec  # the file may say its own
        mean, std = list(prepares.mean), list(prepares.std)
        check_model(spec.name, facts, {"mean": mean, "std": std}, hint)
    curated = Decisions.of(known.uri, decisions, "serve.decisions") if known else None
    return Served(known, spec, curated)


def opened(vectors: VectorSet, decisions: Decisions | None = None) -> Collection:
    """The set in memory, with the orders that its page offers."""
    rows = Rows(vectors)
    few = vectors.rows <= EXACT_ROWS  # above, an index is searched, and vectors stay where they are
    groupings = [everything(vectors.rows)]
    texts = None
    if (rows.labels >= 0).any():
        texts = label_texts(rows.labels, vectors.facts["class_names"])
        groupings.append(by_text("label", texts))
    reasons = None
    if decisions is not None:
        known = decisions.reasons()
        reasons = np.array(
            [known.get(rows.id_of(row), "not curated") for row in range(len(rows))], object
        )
        groupings.append(by_text("decision", reasons))
    if few and vectors.rows > 1:
        groupings.append(by_cluster(vectors.read("cls"), rows.digests()))
    search = open_search(vectors, memory_gib=float("inf") if few else MEMORY_GIB)

    def vector(row: int) -> np.ndarray[Any, Any]:
        one: np.ndarray[Any, Any] = search.vectors_at(np.array([row]))[0]
        return one

    return Collection(
        ids=rows,
        source=rows.source_of,
        labels=texts,
        decisions=reasons,
        groupings={grouping.name: grouping for grouping in groupings},
        search=search.find,
        vector=vector,
        image=_images(vectors, rows),
    )


def _images(vectors: VectorSet, rows: Rows) -> Any:
    try:
        images = rows.images(vectors)
    except DataError as error:
        log.warning("images      are not shown: %s", error.what)
        return None
    return lambda row: images[rows.id_of(row)]
