"""The model that made a set of vectors, opened again only if it is the same."""

from __future__ import annotations

from pipeline.embed.embedders import EmbedderSpec, embedder_of
from pipeline.embed.vectors import VectorSet
from pipeline.errors import DataError, PipelineError, one_line
from pipeline.uri import public

HINT = (
    "name where the model is with search.model=…, or ask for images of the set by their ids, which "
    "needs no model"
)


def model_of(vectors: VectorSet, model: str = "", batch_size: int = 64) -> EmbedderSpec:
    """The embedder that a set names, with the preprocessing of the set.

    Args:
        vectors: the set.
        model: where it is by now; "": where the set says that it was.
        batch_size: images at once.

    Raises:
        DataError: it is not there, or has other weights or another preprocessing by now.
    """
    facts = vectors.facts
    model = model or str(facts["model"])
    size, mean, std = facts["image_size"], list(facts["mean"]), list(facts["std"])
    try:
        spec = embedder_of(model, image_size=size, batch_size=batch_size, mean=mean, std=std)
    except (PipelineError, OSError) as error:
        raise DataError(
            "an image that is not in the set needs the model of the set, which cannot be opened: "
            f"{one_line(error)}",
            HINT,
        ) from error
    for what, now, then in (
        ("digest of the weights", spec.digest, facts["digest"]),
        ("image size", spec.image_size, size),
        ("mean", list(spec.mean), mean),
        ("standard deviation", list(spec.std), std),
    ):
        if now != then:
            raise DataError(
                f"{public(model)} is not the model of the vectors: its {what} is {now}, that of "
                f"the vectors is {then}",
                HINT,
            )
    return spec
