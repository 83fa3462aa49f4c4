"""The whole configuration: one frozen pydantic model, a YAML recipe plus `a.b=value` overrides.

Every field has a one-line doc, a bound and a reader, as `tests/config/test_config_fields.py` holds.
Derived values are not here: `pipeline.plan.plan.resolve` computes them, once.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.config.curation_rules import preset_values, problems
from pipeline.config.sizes import SIZES
from pipeline.uri import allowed, has_secret, public_address

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Range = tuple[Fraction, Fraction]
Weight = Annotated[float, Field(ge=0, le=1000)]


# What `objective=dino` means where a recipe does not say it (Caron et al. 2021, section 3 and
# table 8 of its appendix).
DINO: dict[str, dict[str, Any]] = {
    "loss": {"ibot_weight": 0.0, "koleo_weight": 0.0, "mask_probability": 0.0},
    "teacher": {"momentum": 0.996},
    "augment": {"global_scale": (0.4, 1.0), "local_scale": (0.05, 0.4)},
}
# Distillation hides nothing and drops nothing (DINOv2 paper, section 5).
DISTILLATION: dict[str, dict[str, Any]] = {
    "loss": {"mask_probability": 0.0},
    "model": {"drop_path": 0.0},
}


class Section(BaseModel):
    """A group of fields: unknown keys are refused, numbers are finite, values never change.

    No text holds a key or a password: the config is written into the run folder, into checkpoints
    and to MLflow, and what is typed can be seen in the list of processes and jobs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _no_secrets(cls, value: Any) -> Any:
        several = value.values() if isinstance(value, dict) else ()
        for text in (value, *several):
            if isinstance(text, str) and has_secret(text):
                raise ValueError(
                    f"{public_address(text)} was given with what may be a key or password: nothing "
                    f"before the host, and {allowed(text)}; put keys into the environment "
                    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD)"
                )
        return value


class Run(Section):
    """Which run this is."""

    name: str = Field("", description="name of the run; default: the recipe's file name")
    folder: str = Field(
        "runs", description="where run folders go: a path that all nodes share, or a URI"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything that is drawn")


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


class Model(Section):
    """The backbone (DINOv2 paper, table 17)."""

    encoder: str = Field(
        "dinov2",
        pattern="^(dinov2|timm:.+)$",
        description="dinov2: the ViT of these fields; timm:<name>: a timm model, of which only "
        "patch_size, in_channels and drop_path are set here",
    )
    init: str = Field(
        "",
        description="weights to start from: dinov2 .pth, Hugging Face or timm folder, safetensors, "
        "or a run folder of ours (then with its heads)",
    )
    init_resize: bool = Field(
        False, description="resize the position embeddings of init to this run's image size"
    )
    size: Literal["vits", "vitb", "vitl", "vitg"] = Field("vits", description="backbone size")
    width: Positive | None = Field(None, description="overrides the size's width")
    depth: Positive | None = Field(None, description="overrides the size's number of blocks")
    heads: Positive | None = Field(None, description="overrides the size's attention heads")
    patch_size: Positive = Field(14, description="side of a patch, pixels")
    in_channels: Positive = Field(3, description="channels of an image; 3 is RGB")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP over the width")
    ffn: Literal["mlp", "swiglu"] = Field("mlp", description="feed-forward; swiglu in the L and g")
    registers: int = Field(4, ge=0, description="register tokens; 0 in the paper's training runs")
    layer_scale: float = Field(1e-5, gt=0, description="initial LayerScale")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth; .3 short, .4 long")
    interpolate_offset: NonNegative = Field(
        0.0, description="added to the grid when position embeddings are resized; official: .1"
    )
    interpolate_antialias: bool = Field(
        True, description="antialias resized position embeddings; official training: false"
    )

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """Width, depth, heads with the overrides applied."""
        width, depth, heads = SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads

    @model_validator(mode="after")
    def _divides(self) -> Model:
        width, _, heads = self.dimensions
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        return self


class Head(Section):
    """The DINO head: MLP, bottleneck, weight-normed prototypes."""

    prototypes: Positive = Field(65536, description="prototypes K; 131072 in the long recipe")
    bottleneck: Positive = Field(
        256, description="width before the prototypes; 384 in the long one"
    )
    hidden: Positive = Field(2048, description="hidden width of the head's MLP")
    layers: int = Field(3, ge=1, le=8, description="linear layers of the head's MLP")


class IbotHead(Head):
    """iBOT's head; shared with DINO unless `separate`."""

    separate: bool = Field(False, description="a head of its own for iBOT; long recipe: true")


class Loss(Section):
    """The objective (DINOv2 paper, section 4)."""

    dino_weight: NonNegative = Field(1.0, description="weight of the DINO terms")
    ibot_weight: NonNegative = Field(1.0, description="weight of the iBOT term")
    koleo_weight: NonNegative = Field(0.1, description="weight of the KoLeo term")
    centring: Literal["softmax", "sinkhorn"] = Field(
        "softmax", description="how targets are balanced; sinkhorn in the long recipe"
    )
    centre_momentum: float = Field(0.9, ge=0, lt=1, description="EMA of the softmax centre")
    student_temperature: float = Field(0.1, gt=0, description="temperature of the student")
    mask_probability: Fraction = Field(0.5, description="share of global crops that are masked")
    mask_ratio: Range = Field((0.1, 0.5), description="share of patches hidden in a masked crop")

    @model_validator(mode="after")
    def _something(self) -> Loss:
        if not self.dino_weight and not self.ibot_weight:
            raise ValueError("dino_weight and ibot_weight are both 0: nothing would be learnt")
        if self.mask_ratio[0] > self.mask_ratio[1]:
            raise ValueError("mask_ratio must be low, high")
        return self


class Optim(Section):
    """AdamW, its schedules and the length of the run."""

    passes: float | None = Field(
        None, gt=0, description="length of the run in passes over the data"
    )
    steps: Positive | None = Field(
        None, le=99_999_999, description="length of the run in steps, or give passes"
    )
    global_batch_size: Positive = Field(
        1024, description="images in one step = workers x batch size x accumulation"
    )
    lr: float = Field(2e-3, gt=0, description="peak learning rate before lr_scaling")
    lr_scaling: Literal["sqrt_1024", "none"] = Field(
        "sqrt_1024", description="lr x sqrt(global batch size / 1024), or lr as it is"
    )
    min_lr: NonNegative = Field(1e-6, description="learning rate at the end")
    warmup: Fraction = Field(0.1, description="share of the steps with rising lr; .16 long recipe")
    weight_decay: NonNegative = Field(0.04, description="weight decay at the start")
    weight_decay_end: NonNegative = Field(
        0.4, description="weight decay at the end; .2 long recipe"
    )
    betas: tuple[Below1, Below1] = Field((0.9, 0.999), description="AdamW's betas")
    clip: float = Field(3.0, gt=0, description="gradient norm limit of each sub-module")
    layerwise_decay: float = Field(
        0.9, gt=0, le=1, description="lr factor per block; 1.0 long recipe"
    )
    patch_embed_lr: float = Field(0.2, ge=0, description="lr factor of the patch embedding")
    freeze_last_layer: Fraction = Field(
        0.01, description="share of the steps with frozen prototypes; .002 long recipe"
    )

    @model_validator(mode="after")
    def _length(self) -> Optim:
        if self.passes is not None and self.steps is not None:
            raise ValueError("give either passes or steps, not both")
        return self


class Teacher(Section):
    """The EMA of the student and its temperature."""

    momentum: Fraction = Field(0.992, description="EMA momentum at the start; .994 long recipe")
    momentum_end: Fraction = Field(1.0, description="EMA momentum at the end")
    temperature: float = Field(0.04, gt=0, description="temperature at the start")
    temperature_end: float = Field(0.07, gt=0, description="temperature after its warm-up")
    temperature_warmup: Fraction = Field(
        0.3, description="share of the steps with rising temperature; .06 long recipe"
    )


class Train(Section):
    """How the run is laid out over workers and time."""

    workers: Positive | tuple[Positive, Positive] | Literal["auto"] = Field(
        "auto",
        description="training workers; auto: one per GPU, else one per two CPUs, at most 8; "
        "[2,8]: as many of these as the cluster has room for, now and later",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: GPUs where the cluster has them; cpu for very small networks"
    )
    accumulation: Positive = Field(1, description="micro batches that a worker adds up in a step")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="autocast type; auto: bfloat16 where the hardware has it"
    )
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile the blocks; auto: on GPUs"
    )
    log_every: Positive = Field(10, description="steps between step lines and MLflow points")
    eval_every: Positive | None = Field(None, description="steps; default: a tenth of the run")
    save_every: Positive | None = Field(None, description="steps; default: a twentieth of the run")
    keep_last: Positive = Field(2, description="checkpoints kept beside the best one")
    freeze_backbone_steps: int = Field(
        0, ge=0, description="steps in which only the heads learn; for fresh heads on model.init"
    )
    max_restarts: int = Field(
        3, ge=0, description="restarts of the worker group without a new checkpoint in between"
    )

    @model_validator(mode="after")
    def _range(self) -> Train:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            low, high = self.workers
            raise ValueError(
                f"train.workers=[{low},{high}] is no range; did you mean [{high},{low}]?"
            )
        return self


class Distill(Section):
    """Learning from a frozen, larger teacher (DINOv2 paper, section 5)."""

    teacher: str = Field(
        "", description="run folder or checkpoint of the frozen teacher; empty: self-distillation"
    )


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


class Curate(Section):
    """Which images of the pile are trained on; empty preset: all of them."""

    preset: Literal["", "dedup", "lvd142m", "balanced"] = Field(
        "", description="what the curate stage does; empty: the chain trains on all packed images"
    )
    shards: str = Field("", description="curated shards; default: <run folder>/curated")
    copy_embedder: str = Field(
        "descriptor",
        description="vectors that find copies: descriptor (no weights), a run folder, weights as "
        "for model.init, or a model in ONNX",
    )
    embedder: str = Field(
        "descriptor",
        description="vectors that tell what an image shows, for retrieval and balance; likewise",
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


class Export(Section):
    """Which weights leave the run."""

    checkpoint: Literal["best", "last"] = Field(
        "best", description="which teacher is exported: the best by kNN or the last one"
    )


class Track(Section):
    """MLflow."""

    enabled: bool = Field(True, description="false: the local journal only, no MLflow")
    uri: str = Field(
        "",
        description="MLflow server, or sqlite:///FILE; default: MLFLOW_TRACKING_URI, else one is "
        "started",
    )
    experiment: str = Field("", description="MLflow experiment; default: the run's name")
    system_metrics: bool = Field(True, description="CPU, memory and GPU use of rank 0's machine")
    model_name: str = Field("", description="registered model; empty: log it, do not register")

    @field_validator("uri")
    @classmethod
    def _address(cls, value: str) -> str:
        if "@" in value and "://" not in value:
            raise ValueError("is no address, and has an @ in it; write http://HOST:5000")
        return value


class Resources(Section):
    """What the run takes from the machine or cluster."""

    cpus: Positive | None = Field(None, description="CPUs for a Ray started here; default: all")
    object_store_gb: float = Field(2.0, gt=0, description="object store of a Ray started here")
    cpus_per_worker: float | None = Field(
        None,
        gt=0,
        description="CPUs that a training worker reserves; default: a quarter, 1 with GPU",
    )
    gpus_per_worker: float = Field(
        1.0, gt=0, le=1, description="below 1, training workers share a GPU, over gloo"
    )
    decode_tasks: Positive | None = Field(
        None, description="decode tasks at once; default: what the free CPUs allow"
    )
    feeder_cpus: float | None = Field(
        None,
        ge=0,
        description="CPUs of the driver's node that decoders leave to the feeder; default: 1 on "
        "a node with 16 and more, if workers leave it",
    )
    wait_s: float = Field(
        0.0,
        ge=0,
        description="how long a plan waits for nodes that may still come; 0: refused at once",
    )
    replace_s: float = Field(
        900.0,
        ge=0,
        description="how long training waits for room again, e.g. for another node for a lost one",
    )
    threads: Positive | None = Field(
        None, description="torch threads of a worker; default: the machine's CPUs over its workers"
    )


class Config(Section):
    """The recipe: what the user decides. See `pipeline.plan.plan.Plan` for what follows from it."""

    objective: Literal["dinov2", "dino"] = Field(
        "dinov2", description="dino: DINO (2021), i.e. no masks, no iBOT, no KoLeo, its own EMA"
    )
    run: Run = Run()
    data: Data = Data()
    augment: Augment = Augment()
    model: Model = Model()
    head: Head = Head()
    ibot_head: IbotHead = IbotHead()
    loss: Loss = Loss()
    optim: Optim = Optim()
    teacher: Teacher = Teacher()
    train: Train = Train()
    distill: Distill = Distill()
    curate: Curate = Curate()
    quality: Quality = Quality()
    dedup: Dedup = Dedup()
    leaks: Leaks = Leaks()
    retrieve: Retrieve = Retrieve()
    balance: Balance = Balance()
    mix: Mix = Mix()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    track: Track = Track()
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """What an objective or a preset sets where the recipe says nothing."""
        if not isinstance(values, dict):
            return values
        distill, curate = (
            found if isinstance(found := values.get(name), dict) else {}
            for name in ("distill", "curate")
        )
        preset = preset_values(*(str(curate.get(n, "")) for n in ("preset", "copy_embedder")))
        for wanted, defaults in (
            (values.get("objective") == "dino", DINO),
            (distill.get("teacher"), DISTILLATION),
            (True, preset),
        ):
            for section, fields in defaults.items() if wanted else ():
                given = values.get(section, {})
                if isinstance(given, dict):
                    values = values | {section: fields | given}
        return values

    @model_validator(mode="after")
    def _terms(self) -> Config:
        loss = self.loss
        if self.objective == "dino" and (loss.ibot_weight or loss.koleo_weight):
            raise ValueError(
                f"objective=dino has no iBOT and no KoLeo, but loss.ibot_weight={loss.ibot_weight} "
                f"and loss.koleo_weight={loss.koleo_weight}; set both to 0 or use objective=dinov2"
            )
        if self.objective == "dino" and loss.mask_probability:
            raise ValueError("objective=dino hides nothing; set loss.mask_probability=0")
        if self.objective == "dino" and self.distill.teacher:
            raise ValueError("objective=dino has no frozen teacher; leave distill.teacher empty")
        if self.distill.teacher and loss.mask_probability:
            raise ValueError("distillation hides nothing; set loss.mask_probability=0")
        if loss.ibot_weight and not loss.mask_probability and not self.distill.teacher:
            raise ValueError(
                "loss.ibot_weight is not 0 but loss.mask_probability is: iBOT needs masks"
            )
        return self

    @model_validator(mode="after")
    def _used(self) -> Config:
        """Refuses what would be ignored."""
        ibot = self.ibot_head
        if ibot.separate and not self.loss.ibot_weight:
            raise ValueError(
                "ibot_head.separate=true makes a head that nothing trains: loss.ibot_weight is 0"
            )
        if not ibot.separate and ibot != IbotHead():
            raise ValueError(
                "ibot_head has values of its own but ibot_head.separate is false: iBOT would use "
                "head; set ibot_head.separate=true"
            )
        if self.model.init_resize and not self.model.init:
            raise ValueError("model.init_resize=true, but model.init is empty: nothing to resize")
        return self

    @model_validator(mode="after")
    def _curated(self) -> Config:
        if found := problems(self):
            raise ValueError("\n".join(found))
        return self

    @model_validator(mode="after")
    def _channels(self) -> Config:
        channels = self.model.in_channels
        for name in ("mean", "std"):
            values = getattr(self.augment, name)
            if len(values) != channels:
                raise ValueError(
                    f"augment.{name} has {len(values)} numbers, but model.in_channels={channels}; "
                    "give one for each channel"
                )
        return self

    @model_validator(mode="after")
    def _patches(self) -> Config:
        patch = self.model.patch_size
        if self.model.encoder != "dinov2" and not self.loss.ibot_weight:
            return self  # an encoder that may have no patches: it says itself what it takes
        for name, size in (
            ("augment.global_size", self.augment.global_size),
            ("augment.local_size", self.augment.local_size if self.augment.local_crops else patch),
            ("evaluate.image_size", self.evaluate.image_size or patch),
        ):
            if size % patch:
                raise ValueError(
                    f"{name}={size} is not a multiple of model.patch_size={patch}; "
                    f"the nearest is {max(1, round(size / patch)) * patch}"
                )
        return self
