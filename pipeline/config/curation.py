"""Which images of the pile are trained on; `curation_rules.py` says which fields need which."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Fraction, NonNegative, Positive, Section, Weight


class Curate(Section):
    """Which images of the pile are trained on; empty preset: all of them."""

    preset: Literal["", "dedup", "lvd142m", "balanced"] = Field(
        "", description="what the curate stage does; empty: the chain trains on all packed images"
    )
    shards: str = Field("", description="curated shards; default: <run folder>/curated")
    rounds: Positive = Field(
        1,
        description="trainings, each on images chosen by the network of the one before; the first "
        "on what is chosen without weights, or by embedder",
    )
    rounds_init: Literal["recipe", "previous"] = Field(
        "recipe",
        description="what later rounds start from: as the recipe says (model.init, else random "
        "weights), or the weights of the previous round",
    )
    copy_embedder: str = Field(
        "descriptor",
        description="vectors that find copies: descriptor (no weights), a run's folder or name, "
        "weights as for model.init, timm:<name>, or a model in ONNX",
    )
    embedder: str = Field(
        "",
        description="vectors that tell what an image shows, for retrieval and balance: a trained "
        "network, named likewise",
    )
    image_size: Positive | None = Field(None, description="of embedders; default: their own")
    batch_size: Positive = Field(64, description="images embedded at once")
    against: str = Field(
        "", description="run folder of a curated set that these images are added to"
    )
    query: str = Field(
        "", description="an image to look up in the run's curated set, or in against"
    )


class Quality(Section):
    """Rules that need no other image; 0 switches a rule off."""

    enabled: bool = Field(True, description="false: only what cannot be decoded goes")
    min_side: int = Field(32, ge=0, description="shorter side, pixels (too_small)")
    max_aspect: NonNegative = Field(4.0, description="long over short side (aspect)")
    min_entropy: NonNegative = Field(0.0, description="luminance histogram, bits of 8 (flat)")
    min_contrast: NonNegative = Field(4.0, description="deviation of the luminance of 255 (flat)")
    min_brightness: NonNegative = Field(
        0.0, description="brightest 5 % are darker than this, of 255 (flat)"
    )
    max_brightness: NonNegative = Field(
        0.0, description="darkest 5 % are brighter than this, of 255 (flat)"
    )
    min_sharpness: NonNegative = Field(
        10.0, description="Laplacian's variance at 32 x 32 pixels; low: gradients, blanks (flat)"
    )
    min_edges: NonNegative = Field(
        16.0,
        description="of 128 x 128 cells, with a clear edge: so many pass min_entropy, "
        "min_contrast and min_sharpness; 0: edges do not count",
    )
    sample: Positive = Field(2000, description="images that a dry run measures")


class Dedup(Section):
    """Copies within the set (DINOv2 paper, appendix A.3)."""

    enabled: bool = Field(True, description="false: only equal bytes and equal pixels go")
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = Field(
        "auto", description="cosine above which two images are copies; auto: calibrated; SSCD: .6"
    )
    false_positives: Annotated[float, Field(gt=0, le=1e-3)] | Literal["auto"] = Field(
        "auto",
        # the bound: the threshold is read off the 20,000 most alike of 12.5 million pairs
        description="share of unlike pairs that may be taken for copies when the threshold is "
        "calibrated, <= 1e-3; auto: 0.01 / images, at most 1e-6",
    )
    calibration_images: int = Field(
        500, gt=0, le=4000, description="of the set, attacked to see which copies are found"
    )
    probes: Positive = Field(8, description="cells in which an image is compared; 16 above 10^8")
    cell_images: Positive | None = Field(
        None, description="mean images in a cell; default: what costs least"
    )
    guard: float = Field(
        0.1, gt=0, lt=1, description="a member that is so much less like its keeper is a chain"
    )
    chains: Literal["split", "keep"] = Field(
        "split", description="keep: one image of each component, as in the paper"
    )
    max_share: Fraction = Field(
        0.3, description="near copies of more of the images than this end the stage; 1: never"
    )


class Leaks(Section):
    """Images of evaluation sets that are in the pile (DINOv2 paper, appendix A.3)."""

    sets: dict[str, str] = Field(
        {}, description="leaks.sets.<name>=shards of an evaluation set; evaluate.queries is one"
    )
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = Field(
        "auto", description="cosine; auto: the one of dedup; SSCD: .45"
    )
    scope: Literal["images", "components"] = Field(
        "images", description="what goes: the images that match, or their whole components"
    )


class Retrieve(Section):
    """Images like those of seed sets (DINOv2 paper, section 3)."""

    seeds: dict[str, str] = Field(
        {}, description="retrieve.seeds.<name>=shards of a seed set; none: no retrieval"
    )
    mode: Literal["auto", "sample", "cluster"] = Field(
        "auto", description="neighbours of each seed, or clusters with seeds; auto: by seed images"
    )
    sample_above: Positive = Field(
        1_000_000, description="seed images above which auto takes neighbours"
    )
    neighbours: Positive = Field(4, description="of each seed image; 32 for ImageNet-1k")
    min_similarity: float = Field(
        0.0, ge=0, lt=1, description="neighbours less similar are not taken"
    )
    clusters: Positive | None = Field(
        None, description="of the pool; default: a thousandth of it; the paper: 100,000"
    )
    cluster_seeds: int = Field(
        3, ge=0, description="a cluster with more seed images than this is taken from"
    )
    cluster_images: Positive = Field(10_000, description="taken from such a cluster, at most")
    cap: Positive = Field(1_000_000, description="images for one seed set by clusters, at most")
    include: bool = Field(True, description="seed images go into the curated set as they are")


class Balance(Section):
    """Hierarchical k-means and sampling across its levels (Vo et al. 2024)."""

    images: Positive | None = Field(None, description="to keep; none: no balancing")
    levels: tuple[Positive, ...] = Field(
        (), description="clusters of each level, finest first; default: from the images"
    )
    resampling: int = Field(3, ge=0, description="rounds from points near the centroids, a level")
    iterations: Positive = Field(10, description="of k-means")
    floor: int = Field(1, ge=0, description="images of every leaf that is large enough, at least")
    floor_members: Positive = Field(2, description="images that make a leaf large enough")

    @model_validator(mode="after")
    def _coarser(self) -> Balance:
        if any(a <= b for a, b in pairwise(self.levels)):
            raise ValueError(
                f"levels must have fewer clusters each, finest first, got {list(self.levels)}"
            )
        return self


class Mix(Section):
    """Weights of the parts of the curated set."""

    by: Literal["share", "proportion"] = Field(
        "share",
        description="share: so much of each part is kept; proportion: the parts stand to each "
        "other like their weights, and as much is kept as that allows",
    )
    pool: Weight = Field(1.0, description="images of no other part, where nothing selects")
    as_is: Weight = Field(1.0, description="seed images")
    sample: Weight = Field(1.0, description="retrieved as neighbours")
    cluster: Weight = Field(1.0, description="retrieved by clusters")
    balanced: Weight = Field(1.0, description="sampled by balancing")

    @model_validator(mode="after")
    def _something(self) -> Mix:
        if not (self.pool or self.as_is or self.sample or self.cluster or self.balanced):
            raise ValueError("all weights are 0: nothing would be kept")
        return self
