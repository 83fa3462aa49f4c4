"""The model that made a set of vectors, opened again only if it is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.embed.embedders import Embedder, embedder_of, open_embedder
from pipeline.embed.vectors import VectorSet
from pipeline.errors import DataError, PipelineError, one_line
from pipeline.uri import public

HINT = (
    "name where the model is with search.model=…, or ask for images of the set by their ids, which "
    "needs no model"
)
WORDS = {
    "digest": "digest of the weights",
    "image_size": "image size",
    "std": "standard deviation",
}


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
    check_model(model, facts, {"digest": spec.digest}, HINT)
    embedder = open_embedder(spec, threads=threads)
    mean, std = list(embedder.mean), list(embedder.std)
    check_model(model, facts, {"image_size": embedder.size, "mean": mean, "std": std}, HINT)
    return embedder


def check_model(model: str, facts: Mapping[str, Any], now: Mapping[str, Any], hint: str) -> None:
    """Refuses a model that is not the one that made a set of vectors.

    Args:
        model: its name, for the message.
        facts: of the vectors.
        now: what is known of the model, under the names of the facts.
        hint: what to do.

    Raises:
        DataError: one of `now` is another in the facts.
    """
    for name, value in now.items():
        if value != facts[name]:
            raise DataError(
                f"{public(model)} is not the model of the vectors: its {WORDS.get(name, name)} is "
                f"{value or 'none'}, that of the vectors is {facts[name]}",
                hint,
            )
