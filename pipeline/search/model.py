"""The model that made a set of vectors, opened again only if it is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.embed.embedders import Embedder, EmbedderSpec, embedder_of, open_embedder
from pipeline.embed.moved import beside
from pipeline.embed.vectors import VectorSet
from pipeline.errors import DataError, PipelineError, one_line
from pipeline.storage.places import exists, resolve_uri
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
    try:
        spec = spec_of(vectors, model)
    except (PipelineError, OSError) as error:
        raise DataError(
            "an image that is not in the set needs the model of the set, which cannot be opened: "
            f"{one_line(error)}",
            HINT,
        ) from error
    model = spec.name
    check_model(model, facts, {"digest": spec.digest}, HINT)
    embedder = open_embedder(spec, threads=threads)
    mean, std = list(embedder.mean), list(embedder.std)
    check_model(model, facts, {"image_size": embedder.size, "mean": mean, "std": std}, HINT)
    return embedder


def spec_of(vectors: VectorSet, model: str = "") -> EmbedderSpec:
    """The model that a set names, with the preprocessing of the set; not opened.

    Args:
        vectors: the set.
        model: where it is by now; "": where the set says that it was or, if the folder of the run
            was moved, what has the same digest there.

    Raises:
        PipelineError: it is not there.
    """
    facts = vectors.facts

    def spec_at(place: str) -> EmbedderSpec:
        return embedder_of(
            place,
            image_size=facts["image_size"],
            mean=facts["mean"],
            std=facts["std"],
            half=facts.get("precision") == "bfloat16",
        )

    if model:
        return spec_at(model)
    name = str(facts["model"])
    try:
        return spec_at(name)
    except (PipelineError, OSError):
        run = vectors.uri.rstrip("/").rpartition("/")[0]
        fs, path = resolve_uri(run)
        runs = [run] * exists(fs, f"{path}/checkpoints")  # the set may name the run as a whole
        for place in (*beside(vectors.uri, name), *runs):
            if not exists(*resolve_uri(place)):
                continue
            try:
                spec = spec_at(place)
            except (PipelineError, OSError):  # something else of that name
                continue
            if spec.digest == facts["digest"]:
                return spec
        raise


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
