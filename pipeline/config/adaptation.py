"""What starts from given weights: an adaptation, its guard, and a classifier."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.section import Below1, Fraction, NonNegative, Positive, Range, Section


class Adapt(Section):
    """A recipe for weights that exist and images that they do not know yet."""

    enabled: bool = Field(
        False,
        description="derive what the recipe leaves open from the weights in model.init and from "
        "the number of images; jobs/adapt.py does",
    )
    card: bool = Field(
        True, description="score the weights as they are before training, on the same images"
    )


class Guard(Section):
    """Ends a training that makes its weights worse than they were at the start."""

    enabled: Literal["auto"] | bool = Field(
        "auto", description="compare each evaluation with the start; auto: where model.init is set"
    )
    score: str = Field(
        "",
        description="what is compared, e.g. knn20_top1; default: evaluate.decide_by; what needs no "
        "labels where there are none",
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
        description="loss on guard.keep that is allowed, 0.01 is a point; more of it ends the "
        "training too; 1: never",
    )

    def is_on(self, init: str) -> bool:
        """Whether a run that starts from `init` (`model.init`) is guarded."""
        return self.enabled is True or (self.enabled == "auto" and bool(init))


class Finetune(Section):
    """A classifier of labelled images, on a backbone that learns with it or not."""

    model: str = Field(
        "",
        description="a run's folder or name, weights or timm:<name>; default: this run's own "
        "teacher",
    )
    from_scratch: bool = Field(
        False, description="true: the model's architecture with weights drawn anew, as a baseline"
    )
    tune: Literal["all", "head", "low_rank"] = Field(
        "all", description="what learns beside the head: all weights, none, low-rank updates"
    )
    rank: Positive = Field(8, description="of the low-rank updates of attention")
    epochs: float | None = Field(
        None, gt=0, description="length in passes over the images; default 20, or give steps"
    )
    steps: Positive | None = Field(None, le=99_999_999, description="length in steps")
    batch_size: Positive = Field(128, description="images in one step, of all workers together")
    lr: float = Field(5e-4, gt=0, description="peak learning rate, of the head, at any batch size")
    layerwise_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="lr factor per block, from the head down; default 0.75, from scratch 1",
    )
    weight_decay: NonNegative = Field(0.05, description="of AdamW; none on vectors and norms")
    warmup: Fraction = Field(0.1, description="share of the steps with rising lr")
    drop_path: Below1 = Field(0.0, description="stochastic depth with tune=all; 0.1 for long runs")
    mixup: NonNegative = Field(0.0, description="Beta(a, a) of mixup; 0: off; 0.8 for long runs")
    label_smoothing: Below1 = Field(0.0, description="share of the target given to all classes")
    label_fraction: float = Field(
        1.0, gt=0, le=1, description="share of the labels of each class, at least one; 0.01, 0.1"
    )
    image_size: Positive | None = Field(None, description="pixels; default: the model's own")
    crop_scale: Range = Field((0.35, 1.0), description="areas of random crops; [1,1] for none")
    flip: Fraction = Field(0.5, description="share of images that are mirrored")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="autocast type; auto: bfloat16 where the hardware has it"
    )
    seed: int = Field(
        0, ge=0, description="of the head, the order, the crops and the label fraction"
    )

    @model_validator(mode="after")
    def _length(self) -> Finetune:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps, not both")
        if self.crop_scale[0] > self.crop_scale[1] or not self.crop_scale[1]:
            raise ValueError("crop_scale must be low, high")
        return self
