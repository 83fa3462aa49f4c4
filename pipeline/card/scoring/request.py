"""What an evaluation is asked for: networks, sets, groups of scores and their numbers."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.card.dense.sets import DenseSet
from pipeline.card.dense.split import DenseSettings
from pipeline.card.inputs.networks import Network
from pipeline.card.inputs.sets import Sets
from pipeline.card.scoring.scores import Scoring
from pipeline.config.embedding import NEEDS_LABELS
from pipeline.uri import Place, public


@dataclass(frozen=True)
class Dense:
    """Images with masks or depth, and how dense scores are made of them.

    Attributes:
        reference: what heads are fitted to.
        queries: what is scored; None: a part of the reference is held out.
        settings: of both.
    """

    reference: DenseSet
    queries: DenseSet | None
    settings: DenseSettings

    @property
    def said(self) -> str:
        """Both sets in words."""
        whole = f"{len(self.reference.rows):,} images of {public(self.reference.uri)}"
        if self.queries is None:
            return f"{whole}, a part of them held out"
        asked = f"{len(self.queries.rows):,} images of {public(self.queries.uri)}"
        return f"{asked}, by layers fitted to {whole}"


@dataclass(frozen=True)
class Request:
    """What is to be scored, and how.

    Attributes:
        networks: models, each followed by what it began as.
        sets: what vectors are scored on; None: only dense scores are asked for.
        folder: of the evaluation; tables of vectors go into `vectors/` of it.
        groups: of scores, as `evaluate.scores` names them.
        scoring: numbers that scores depend on.
        dense: what dense scores are of; None: there are none.
        decide_by: the score of the verdict; "": k-NN where there are labels, else rank_me.
        title: of the card.
        max_pixels: larger images are refused.
        gpu: GPUs may be used.
        remarks: what is known already and belongs on the card.
        unusable: why labels of one set say nothing about a model; "": they do, or nobody looked.
    """

    networks: tuple[Network, ...]
    sets: Sets | None
    folder: Place
    groups: tuple[str, ...]
    scoring: Scoring
    dense: Dense | None = None
    decide_by: str = ""
    title: str = "Evaluation"
    max_pixels: int = 200_000_000
    gpu: bool = True
    remarks: tuple[str, ...] = ()
    unusable: str = ""

    @property
    def labelled(self) -> bool:
        """Whether there are labels to score with."""
        return self.sets is not None and self.sets.labelled

    @property
    def score(self) -> str:
        """The score that decides."""
        if self.decide_by or self.labelled:
            return self.decide_by or f"knn{self.scoring.k}_top1"
        if self.sets is None and self.dense is not None:
            masks = "masks" in self.dense.reference.targets
            return "segmentation_linear_miou" if masks else "depth_linear_rmse"
        return "rank_me"

    def has(self, group: str) -> bool:
        """Whether a group of scores is asked for and possible."""
        if group == "dense":
            return self.dense is not None and group in self.groups
        possible = (self.labelled and not self.unusable) or group not in NEEDS_LABELS
        return self.sets is not None and possible and group in self.groups
