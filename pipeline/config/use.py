"""What is asked of a backbone and of its vectors: `look`, `search` and `serve`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import NonNegative, Positive, Section

Id = Annotated[int, Field(ge=0, le=255)]


class Start(Section):
    """What jobs/start.py writes a recipe for."""

    recipe: str = Field("", description="file to write; default: the folder's name and .yaml")
    gpu_gb: float | None = Field(
        None,
        gt=0,
        description="for one GPU of this size, as sold, wherever; default: the machine's",
    )
    hours: float | None = Field(
        None, gt=0, description="longest training to plan; default: 8 on CPUs, 24 on GPUs"
    )


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


class Search(Section):
    """Nearest neighbours among vectors that `embed` wrote."""

    enabled: bool = Field(
        False, description="in a whole chain: a page of neighbours of some images of the set"
    )
    vectors: str = Field(
        "", description="folder of vectors, or a run that has them; default: those of this run"
    )
    query: str = Field(
        "",
        description="an image file, an id or its beginning, a folder, parquet of images or "
        "vectors; several with commas between them",
    )
    k: int = Field(20, gt=0, le=10_000, description="neighbours of each image")
    min_similarity: float = Field(
        -1.0, ge=-1, le=1, description="neighbours below this cosine are left out"
    )
    vectors_column: Literal["cls", "mean"] = Field(
        "cls", description="which vectors: the CLS token, or the mean of the patches"
    )
    index: Literal["auto", "exact", "ivf"] = Field(
        "auto", description="exact, or an index (ivf); auto: an index above a million vectors"
    )
    memory_gib: float = Field(
        4.0, gt=0, description="exact search keeps vectors in memory up to this size"
    )
    model: str = Field(
        "", description="where the vectors' model is by now; default: where they say it was"
    )
    decisions: str = Field(
        "", description="curated run whose decisions are shown; default: the vectors' own run"
    )
    images: Positive = Field(
        8, le=100, description="in a whole chain: images of the set whose neighbours are shown"
    )


class Serve(Section):
    """A model and its vectors over HTTP, on this machine alone unless a host is named."""

    model: str = Field(
        "",
        description="what embeds images that are sent, as embed.model; default: the vectors' own",
    )
    vectors: str = Field("", description="vectors to search and to show, written by jobs/embed.py")
    decisions: str = Field(
        "", description="run whose curation's decisions are shown; default: the vectors' own run"
    )
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: all of the machine")
    port: int = Field(8000, ge=0, le=65535, description="0: any that is free")
    needs_token: bool = Field(
        True,
        description="false: none is asked for; it is RAYDINO_TOKEN in the environment or a new one",
    )
    readers: Positive = Field(
        1, description="processes that read, decode and search, each with the vectors in memory"
    )
    replicas: Positive = Field(1, description="copies of the model, each with cpus and gpus")
    cpus: Positive = Field(1, description="CPUs of a replica, and threads of its model")
    gpus: float | None = Field(
        None, ge=0, description="of each replica; default: 1 where the cluster has them"
    )
    batch_size: Positive = Field(32, description="images that the model takes at once")
    batch_wait_ms: NonNegative = Field(
        5.0, description="how long the first image of a batch waits for others"
    )
    queue: Positive = Field(
        128, description="requests for the model in a reader, waiting or running; more get 503"
    )
    timeout_s: float = Field(
        30.0, gt=0, description="how long a request may take; a body that comes slower gets 408"
    )
    max_mb: float = Field(20.0, gt=0, description="megabytes of a request; more gets 413")
    max_pixels: Positive = Field(50_000_000, description="height x width; more gets 413")
    max_k: Positive = Field(1000, description="most neighbours of one search")
