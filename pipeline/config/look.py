"""What a backbone sees in images: the section `look`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Positive, Section

Id = Annotated[int, Field(ge=0, le=255)]


class Look(Section):
    """Attention, components, similarity and masks of a few images."""

    enabled: bool = Field(False, description="whole runs end with a look at images of their set")
    model: str = Field(
        "",
        description="a run's folder or name, weights or timm:NAME; default: this run's checkpoint",
    )
    images: tuple[str, ...] = Field(
        (), description="image files and folders; default: a few of the run's set"
    )
    count: int = Field(
        6, ge=1, le=64, description="images of the run's set, spread over it, where none are named"
    )
    image_size: Positive | None = Field(
        None, description="shorter side of the images in pixels; default: the model's own"
    )
    block: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="number of the block whose attention is shown, from 0; default: the last",
    )
    mark: str = Field(
        "", description="x,y of a pixel of the first image: similarity of all patches to its own"
    )
    reference: tuple[str, ...] = Field(
        (), description="images whose masks are known: the others get masks like theirs"
    )
    mask: tuple[str, ...] = Field(
        (), description="a mask for each reference: PNG, black and white or class ids"
    )
    classes: dict[str, Id] = Field(
        {}, description="look.classes.road=3: ids with names; all others are `other`"
    )
    void: Id = Field(255, description="id of mask pixels that belong to no class")
    method: Literal["mean", "nearest"] = Field(
        "mean", description="masks by the mean patch of each class, or by the k nearest patches"
    )
    k: Positive = Field(10, description="patches that vote, with look.method=nearest")
    out: str = Field("", description="folder for pages and pictures; default: look/ of the run")

    @field_validator("images", "reference", "mask", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,) if value else ()
        return value

    @field_validator("mark")
    @classmethod
    def _pixel(cls, value: str) -> str:
        if value and not re.fullmatch(r"\d{1,6},\d{1,6}", value.replace(" ", "")):
            raise ValueError(f"expected x,y in pixels, such as 120,80 (got {value!r})")
        return value

    @model_validator(mode="after")
    def _together(self) -> Look:
        if len(self.reference) != len(self.mask):
            raise ValueError(
                f"reference names {len(self.reference)} images and mask {len(self.mask)} masks; "
                "give one mask for each reference"
            )
        if self.classes and not self.mask:
            raise ValueError("classes have names, but there is no mask: give reference and mask")
        return self
