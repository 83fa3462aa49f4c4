"""Vectors of images: how the backbone is measured by them, and as a table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pipeline.config.section import Positive, Section

Output = Literal["cls", "mean", "patches", "blocks"]


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


class Embed(Section):
    """Vectors of images, as a table."""

    enabled: bool = Field(False, description="true: jobs/run.py embeds the images at the end")
    model: str = Field(
        "",
        description="a run's folder or name, weights, timm:<name>, a .onnx file or descriptor; "
        "default: this run's own teacher",
    )
    vectors: str = Field("", description="where they go; default: <run folder>/vectors")
    images: Literal["all", "curated"] = Field(
        "all", description="all packed images, or what the curation kept of them"
    )
    outputs: tuple[Output, ...] = Field(
        ("cls",),
        min_length=1,
        description="cls, mean (of the patches), patches (float16), blocks (CLS of the last ones)",
    )
    blocks: Positive = Field(4, description="last blocks whose CLS is kept, for linear evaluation")
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="of what is stored; patches are always float16"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="that the network computes in; bfloat16 is faster on GPUs"
    )
    image_size: Positive | None = Field(None, description="pixels; default: the model's own")
    batch_size: Positive = Field(64, description="images embedded at once")

    @field_validator("outputs")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"each output once, got {', '.join(value)}")
        return value
