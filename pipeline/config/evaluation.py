"""How the backbone is measured."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.section import Positive, Section


class Evaluate(Section):
    """k-NN of the teacher on labelled images."""

    reference: str = Field(
        "", description="labelled shards that vote; default: the training shards"
    )
    queries: str = Field("", description="labelled shards that are classified; empty: health only")
    k: Positive = Field(
        20, description="neighbours that vote; DINOv2 reports the best of 10 to 200"
    )
    temperature: float = Field(0.07, gt=0, description="temperature of the votes")
    image_size: Positive | None = Field(None, description="default: the global crop's size")
    during_training: Positive | None = Field(
        5000, description="images of each set used while training; the evaluate stage uses all"
    )
    batch_size: Positive = Field(256, description="images embedded at once")
