"""Adapting given weights to other images: the guard of their scores."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.section import Fraction, Positive, Section


class Guard(Section):
    """Ends a training that makes its weights worse than they were at the start."""

    enabled: Literal["auto"] | bool = Field(
        "auto", description="compare each evaluation with the start; auto: where model.init is set"
    )
    score: str = Field(
        "",
        description="what is compared, e.g. knn20_top1; default: evaluate.decide_by, without labels "
        "what needs none",
    )
    falls: Positive = Field(
        2, description="evaluations in a row below the start by more than chance that end it"
    )
    least: Fraction = Field(
        0.5, description="without labels: what must be left of the start, which has 1"
    )
    keep: str = Field(
        "",
        description="labelled images on which nothing is to be forgotten: a folder or shards",
    )
    keep_fall: Fraction = Field(
        0.01,
        description="loss on guard.keep that is allowed, 0.01 is a point; more ends it too; 1: never",
    )

    def is_on(self, init: str) -> bool:
        """Whether a run that starts from `init` (`model.init`) is guarded."""
        return self.enabled is True or (self.enabled == "auto" and bool(init))
