"""Which images are read, and the views that are cut from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Fraction, NonNegative, Positive, Range, Section

Hue = Annotated[float, Field(ge=0, le=0.5)]


class Data(Section):
    """Where images come from and how they are packed and read."""

    source: str = Field(
        "",
        description="what to pack: folder, archive, hub-style parquet, shards, a pattern for them, "
        "several with commas between, or builtin:photos",
    )
    follow_links: bool = Field(
        False, description="read what links to files lead to, also outside of the source"
    )
    shards: str = Field(
        "", description="folder of image shards; default: <run folder>/shards, made by pack"
    )
    image_column: str = Field("image", description="parquet column that holds the encoded image")
    label_column: str = Field("label", description="parquet column that holds the label, if any")
    labels: Literal["auto", "folder", "none"] = Field(
        "auto",
        description="where labels come from; folder: the parent folder's name; none: the training "
        "images have no labels, evaluation sets keep theirs",
    )
    label_member: str = Field(
        "cls",
        pattern=r"^(\w[\w.-]*(:[\w.-]+)?)?$",
        description="ending of files beside images that hold their labels, as in WebDataset; "
        "json:class takes a field",
    )
    max_bad_fraction: Fraction = Field(
        0.01, description="a stage ends when more than this share of its rows is bad"
    )
    max_image_pixels: Positive = Field(
        200_000_000,
        description="larger images are bad (too_large); formats that take more memory have less",
    )
    max_image_mb: float = Field(64, gt=0, description="larger encoded files are bad (too_large)")
    range: Literal["auto-from-sample", "full"] | tuple[float, float] = Field(
        "auto-from-sample",
        description="values that become 0 and 255 where samples have more than 8 bits: those that "
        "the images of the set use, [low,high], or full: all of 16 bits",
    )
    scaled_decode: bool = Field(
        True,
        description="decode large JPEGs at 1/2, 1/4 or 1/8 where no crop would be enlarged by it",
    )
    shard_mb: float = Field(256, gt=0, description="size of one packed shard, in MiB")
    row_group_images: Positive = Field(256, description="images in one parquet row group")
    shuffle_images: Positive = Field(
        1024, description="rows drawn from several row groups and shuffled together when training"
    )

    @field_validator("range")
    @classmethod
    def _rising(cls, value: Any) -> Any:
        if isinstance(value, tuple) and value[0] >= value[1]:
            raise ValueError(f"range must be two values low < high, got {list(value)}")
        return value


class Augment(Section):
    """Crops and colour of the views (RECIPE: data/augmentations.py)."""

    global_size: Positive = Field(224, description="side of the two global crops, pixels")
    local_size: Positive = Field(
        98, description="side of the local crops, pixels; 96 with patch 16"
    )
    local_crops: int = Field(8, ge=0, description="local crops of an image; 0 switches them off")
    global_scale: Range = Field(
        (0.32, 1.0), description="area of a global crop; DINO (2021): .4, 1"
    )
    local_scale: Range = Field((0.05, 0.32), description="area of a local crop; DINO: .05, .4")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip, per crop")
    blur: Literal["paper", "released", "none"] = Field(
        "paper",
        description="blur probability of global 1, global 2, local: 1/.1/.5, or 0/.9/.5 as the "
        "released code really does; none for images of few pixels",
    )
    jitter: Fraction = Field(0.8, description="probability of colour jitter, per crop")
    jitter_strengths: tuple[NonNegative, NonNegative, NonNegative, Hue] = Field(
        (0.4, 0.4, 0.2, 0.1),
        description="of colour jitter: brightness, contrast, saturation (factors from 1 - x to "
        "1 + x) and hue (turns, at most .5)",
    )
    greyscale: Fraction = Field(0.2, description="probability of greyscale, per crop")
    solarize: Fraction = Field(0.2, description="probability of solarize, second global crop only")
    mean: tuple[float, ...] = Field(
        (0.485, 0.456, 0.406), description="normalisation mean of each channel (ImageNet)"
    )
    std: tuple[float, ...] = Field(
        (0.229, 0.224, 0.225), description="normalisation deviation of each channel (ImageNet)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two areas 0 < low <= high, got {low}, {high}")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self
