"""What the student learns and how: losses and teachers, optimiser, length, workers, checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Below1, Fraction, NonNegative, Positive, Range, Section

PROFILED = 50  # steps at most in a trace: some ten thousand operations each


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


class Teacher(Section):
    """The EMA of the student and its temperature."""

    momentum: Fraction = Field(0.992, description="EMA momentum at the start; .994 long recipe")
    momentum_end: Fraction = Field(1.0, description="EMA momentum at the end")
    temperature: float = Field(0.04, gt=0, description="temperature at the start")
    temperature_end: float = Field(0.07, gt=0, description="temperature after its warm-up")
    temperature_warmup: Fraction = Field(
        0.3, description="share of the steps with rising temperature; .06 long recipe"
    )


class Distill(Section):
    """Learning from a frozen teacher: its targets over prototypes (DINOv2 paper, section 5), or its
    features (AM-RADIO, arXiv:2312.06709).
    """

    teacher: str = Field(
        "",
        description="frozen teacher: any model of jobs/embed.py (a run, weights, timm:<name>, "
        ".onnx); empty: self-distillation",
    )
    loss: Literal["auto", "targets", "cosine", "smooth_l1"] = Field(
        "auto",
        description="targets: over the teacher's prototypes; cosine, smooth_l1: to its features; "
        "auto: targets where its heads fit this recipe, else cosine",
    )
    cls_weight: NonNegative = Field(1.0, description="weight of the features of CLS")
    patch_weight: NonNegative = Field(
        1.0, description="weight of the features of patches, where both networks have them"
    )
    objective: bool = Field(
        False, description="our own objective (heads, masks, local crops) beside the features"
    )
    image_size: Positive | None = Field(
        None, description="side of the images whose features are learnt; default: the teacher's own"
    )

    @property
    def alone(self) -> bool:
        """Whether a frozen teacher stands in the place of our own objective."""
        return bool(self.teacher) and not self.objective

    @property
    def changed(self) -> list[str]:
        """The fields of features that are not their defaults."""
        own = {n: getattr(self, n) for n in Distill.model_fields if n not in ("teacher", "loss")}
        return [f"distill.{n}" for n in own if own[n] != Distill.model_fields[n].default]

    @model_validator(mode="after")
    def _fits(self) -> Distill:
        changed = self.changed
        if not self.teacher and (changed or self.loss != "auto"):
            names = ", ".join(changed + ["distill.loss"] * (self.loss != "auto"))
            raise ValueError(
                f"distill.teacher is empty, so {names} would do nothing; name a teacher"
            )
        if self.loss == "targets" and self.objective:
            raise ValueError(
                "distill.loss=targets trains the heads for the teacher's prototypes, and "
                "distill.objective=true for our own; take distill.loss=cosine, or "
                "distill.objective=false"
            )
        if self.loss == "targets" and changed:
            raise ValueError(
                f"distill.loss=targets learns no features, so {', '.join(changed)} would do "
                "nothing; take distill.loss=cosine, or leave it out"
            )
        if not self.cls_weight and not self.patch_weight:
            raise ValueError(
                "distill.cls_weight and distill.patch_weight are both 0: nothing would be learnt "
                "of the teacher"
            )
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


@dataclass(frozen=True)
class Tune:
    """Which weights of the student's backbone learn; heads always do."""

    kind: Literal["all", "last_blocks", "lora", "heads"]
    number: int = 0  # of blocks, or the rank

    @classmethod
    def parse(cls, text: str) -> Tune:
        """What a recipe says: `all`, `heads`, `last_blocks=2`, `lora(rank=16)`.

        Raises:
            ValueError: none of these.
        """
        plain = re.sub(r"\s", "", text)
        if plain == "all" or plain == "heads":
            return cls("all" if plain == "all" else "heads")
        if blocks := re.fullmatch(r"last_blocks=([1-9]\d{0,3})", plain):
            return cls("last_blocks", int(blocks[1]))
        if rank := re.fullmatch(r"lora\(rank=([1-9]\d{0,3})\)", plain):
            return cls("lora", int(rank[1]))
        raise ValueError(
            f"train.tune={text[:40]} is none of all, heads, last_blocks=N and lora(rank=R) with "
            "N and R from 1 on; did you mean last_blocks=2 or lora(rank=16)?"
        )

    def __str__(self) -> str:
        """As a recipe says it."""
        forms = {"last_blocks": "last_blocks={}", "lora": "lora(rank={})"}
        return forms.get(self.kind, self.kind).format(self.number)


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
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="ddp: each worker holds all weights and states; fsdp: they are split over the "
        "workers, for networks that do not fit on one device",
    )
    activation_checkpointing: bool = Field(
        False,
        description="compute each block again in the backward pass instead of keeping what it "
        "needs: less memory, a quarter more time",
    )
    accumulation: Positive = Field(1, description="micro batches that a worker adds up in a step")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="autocast type; auto: bfloat16 where the hardware has it"
    )
    residual: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the tokens between two blocks, where precision is bfloat16"
    )
    logits: Literal["auto", "float32"] = Field(
        "auto", description="type of the scores of prototypes; auto: that of precision"
    )
    reduce: Literal["float32", "bfloat16"] = Field(
        "float32", description="type in which workers add up their gradients"
    )
    loss_kernels: Literal["auto", "eager", "triton"] = Field(
        "auto", description="what computes losses and targets; auto: triton on GPUs"
    )
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile the blocks; auto: on GPUs"
    )
    profile_steps: tuple[Positive, Positive] | None = Field(
        None,
        description="first and last step of a trace of rank 0, counted as in the step lines, "
        "e.g. [20,25]; at most 50",
    )
    log_every: Positive = Field(10, description="steps between step lines and MLflow points")
    eval_every: Positive | None = Field(None, description="steps; default: a tenth of the run")
    save_every: Positive | None = Field(None, description="steps; default: a twentieth of the run")
    keep_last: Positive = Field(2, description="checkpoints kept beside the best one")
    freeze_backbone_steps: int = Field(
        0, ge=0, description="steps in which only the heads learn; for fresh heads on model.init"
    )
    tune: str = Field(
        "all",
        description="what learns beside the heads: all, last_blocks=2, lora(rank=16), or heads "
        "alone; all but all need model.init",
    )
    batch_norm: Literal["batch", "kept"] = Field(
        "batch",
        description="what BatchNorm of the backbone normalises with: the batch, or the running "
        "means that model.init brought, which stay as they are",
    )
    max_restarts: int = Field(
        3, ge=0, description="restarts of the worker group without a new checkpoint in between"
    )

    @field_validator("tune")
    @classmethod
    def _tune(cls, text: str) -> str:
        return str(Tune.parse(text))

    @model_validator(mode="after")
    def _range(self) -> Train:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            low, high = self.workers
            raise ValueError(
                f"train.workers=[{low},{high}] is no range; did you mean [{high},{low}]?"
            )
        first, last = self.profile_steps or (1, 1)
        if first > last:
            raise ValueError(
                f"train.profile_steps=[{first},{last}] is no range; did you mean [{last},{first}]?"
            )
        if last - first >= PROFILED:
            raise ValueError(
                f"train.profile_steps=[{first},{last}] are {last - first + 1} steps, too many for "
                f"a trace; take at most {PROFILED}: [{first},{first + PROFILED - 1}]"
            )
        return self
