"""Vectors of images: how the backbone is measured by them, and as a table."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Positive, Section

Output = Literal["cls", "mean", "patches", "blocks", "pixels", "colours"]


ScoreGroup = Literal[
    "knn", "logistic", "linear", "few_shot", "retrieval", "copies", "unlabelled", "dense"
]

VOTERS = (10, 20, 100, 200)  # neighbours of the k-NN on a card, beside evaluate.k
# What can choose the best checkpoint, beside a k-NN: computed while training, higher is better.
DECIDING = (
    "logistic_top1",
    "few_shot1_top1",
    "few_shot5_top1",
    "few_shot10_top1",
    "retrieval_map",
    "rank_me",
)
# What can decide a verdict, by its group, beside these: a card has it with an interval.
IN_VERDICTS: dict[ScoreGroup, tuple[str, ...]] = {
    "linear": ("linear_top1",),
    "retrieval": tuple(f"retrieval_recall{k}" for k in (1, 5, 10)),
    "copies": ("copies_recall1", "copies_map"),
    "dense": (
        "segmentation_linear_miou",
        "segmentation_nearest_miou",
        *(f"depth_{by}_{what}" for by in ("linear", "head") for what in ("rmse", "rel", "delta1")),
    ),
}
NEEDS_LABELS: tuple[ScoreGroup, ...] = ("knn", "logistic", "linear", "few_shot", "retrieval")


def group_of(score: str) -> ScoreGroup:
    """The group that a score which may decide belongs to."""
    for group, names in IN_VERDICTS.items():
        if score in names:
            return group
    if score == "rank_me":
        return "unlabelled"
    groups: tuple[ScoreGroup, ...] = ("knn", "logistic", "few_shot", "retrieval")
    return next(group for group in groups if score.startswith(group))


class Evaluate(Section):
    """How good a backbone is: scores on labelled, dense and unlabelled images, on one card."""

    models: tuple[str, ...] = Field(
        (),
        description="runs, weights, timm:<name> or .onnx files, side by side; default: this run's "
        "own teacher",
    )
    reference: str = Field(
        "",
        description="images that vote: a folder, shards or vectors; default: the training shards",
    )
    queries: str = Field(
        "",
        description="images that are classified; empty: each image of the reference by the others",
    )
    dense: str = Field(
        "", description="images with masks/ or depth/ beside images/, or parquet; for dense scores"
    )
    dense_queries: str = Field(
        "", description="dense images that are scored; empty: a part of evaluate.dense is held out"
    )
    cards: tuple[str, ...] = Field(
        (), description="card.json files or runs to compare on one page; nothing is computed"
    )
    scores: tuple[ScoreGroup, ...] = Field(
        (), description="groups of scores; default: all that the sets allow"
    )
    decide_by: str = Field(
        "",
        description="score of the verdict and of the best checkpoint, e.g. logistic_top1; default: "
        "k-NN where there are labels; without, no checkpoint is best",
    )
    k: Positive = Field(
        20, description="neighbours that vote; DINOv2 reports the best of 10 to 200"
    )
    temperature: float = Field(0.07, gt=0, description="temperature of the votes")
    image_size: Positive | None = Field(None, description="default: the global crop's size")
    dense_size: Positive | None = Field(
        None, description="side of images for dense scores, pixels; default: that of the others"
    )
    void: tuple[int, ...] = Field(
        (255,), description="ids in masks that belong to no class, e.g. 11 or [0,255]"
    )
    during_training: Positive | None = Field(
        5000, description="images of each set used while training; the evaluate stage uses all"
    )
    gpu_share: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="part of a training GPU for evaluations while training; 0: a spare GPU, else "
        "CPUs",
    )
    batch_size: Positive = Field(256, description="images embedded at once")

    @field_validator("models", "cards", "scores", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,) if value else ()
        return value

    @field_validator("void", mode="before")
    @classmethod
    def _one_id_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_validator("void")
    @classmethod
    def _bytes(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 0 <= one <= 255 for one in value):
            raise ValueError(f"ids in masks are 0 to 255, got {list(value)}")
        return value

    @field_validator("gpu_share")
    @classmethod
    def _enough(cls, value: float) -> float:
        if 0 < value < 0.01:
            raise ValueError(f"{value:g} of a GPU is too little; 0 is none, 0.01 the least")
        return round(value, 4)  # Ray counts no finer

    @model_validator(mode="after")
    def _decides(self) -> Evaluate:
        names = [*self.choosing(), *(name for names in IN_VERDICTS.values() for name in names)]
        if self.decide_by and self.decide_by not in names:
            raise ValueError(
                f"evaluate.decide_by={self.decide_by} cannot decide; these scores can: "
                f"{', '.join(names)}"
            )
        return self

    @property
    def own_image_size(self) -> int | None:
        """`image_size` where the recipe's own network is scored: with `models` it is theirs."""
        return None if self.models else self.image_size

    def choosing(self) -> list[str]:
        """Names of the scores that can choose the best checkpoint of a training."""
        return [*(f"knn{k}_top1" for k in sorted({*VOTERS, self.k})), *DECIDING]


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
        description="cls, mean (of the patches), patches (float16), blocks (CLS of the last ones), "
        "pixels and colours (without the model)",
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
