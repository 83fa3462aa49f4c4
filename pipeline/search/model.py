"""The model that made a set of vectors, opened again only if it is the same."""

from __future__ import annotations

from typing import Any

from pipeline.embed.embedders import Embedder, embedder_of, open_embedder
from pipeline.embed.vectors import VectorSet
from pipeline.errors import DataError, PipelineError, one_line
from pipeline.uri import public

HINT = (
    "name where the model is with search.model=…, or ask for images of the set by their ids, which "
    "needs no model"
)


def model_of(vectors: VectorSet, model: str = "", threads: int = 1) -> Embedder:
    """The embedder that a set names, opened, with the preprocessing of the set.

    Args:
        vectors: the set.
        model: where it is by now; "": where the set says that it was.
        threads: of torch.

    Raises:
        DataError: it is not there, or has other weights or another preprocessing by now.
    """
    facts = vectors.facts
    model = model or str(facts["model"])
    try:
        spec = embedder_of(
            model,
            image_size=facts["image_size"],
            mean=facts["mean"],
            std=facts["std"],
            half=facts.get("precision") == "bfloat16",
        )
    except (PipelineError, OSError) as error:
        raise DataError(
            "an image that is not in the set needs the model of the set, which cannot be opened: "
            f"{one_line(error)}",
            HINT,
        ) from error
    _check(model, "digest of the weights", spec.digest, facts["digest"])
    embedder = open_embedder(spec, threads=threads)
    _check(model, "image size", embedder.size, facts["image_size"])
    _check(model, "mean", list(embedder.mean), facts["mean"])
    _check(model, "standard deviation", list(embedder.std), facts["std"])
    return embedder


def _check(model: str, what: str, now: Any, then: Any) -> None:
    if now != then:
        raise DataError(
            f"{public(model)} is not the model of the vectors: its {what} is {now or 'none'}, that "
            f"of the vectors is {then}",
            HINT,
        )
