"""Of how many evaluations a run's weights are the best: the best of many looks too good."""

from __future__ import annotations

from pipeline.card.inputs.sets import Sets
from pipeline.card.words import UNLABELLED
from pipeline.embed.beginnings import checkpoint_of
from pipeline.embed.embedders import EmbedderSpec
from pipeline.train.checkpoint.best import read_best
from pipeline.train.checkpoint.files import step_of
from pipeline.uri import parent


def chosen_from(spec: EmbedderSpec, score: str, sets: Sets | None) -> int:
    """Evaluations, on the images that are asked, that a model is the best of. 1: it is no
    checkpoint, or was not chosen by this score, or on other images.

    Args:
        spec: of the model.
        score: that decides on the card.
        sets: that it is scored on.
    """
    if not (checkpoint := checkpoint_of(spec)) or sets is None or score in UNLABELLED:
        return 1
    folder, name = parent(checkpoint)
    best = read_best(folder)
    if best is None or best.step != step_of(name) or best.name != f"eval/{score}":
        return 1
    asked = sets.queries or sets.reference
    return max(1, len(best.evaluated)) if best.asked == asked.digest_of_all else 1


def remark(name: str, evaluations: int) -> str:
    """What the card says of it."""
    return (
        f"{name} was chosen as the best of {evaluations:,} evaluations on these images, or on a "
        "sample of them, which flatters it: the verdict asks for gains beyond that, and tables "
        "show plain 95 % intervals"
    )
