"""The whole configuration: one frozen pydantic model, a YAML recipe plus `a.b=value` overrides.

Each section stands in the file of its group. Here are `Config` itself, and the checks that compare
one section with another. Every field has a one-line doc, a bound and a reader, as
`tests/config/test_config_fields.py` holds. Derived values are not here:
`pipeline.plan.plan.resolve` computes them, once.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config.adaptation import Adapt, Finetune, Guard
from pipeline.config.curation import Balance, Curate, Dedup, Leaks, Mix, Quality, Retrieve
from pipeline.config.curation_rules import preset_values, problems
from pipeline.config.data import Augment, Data
from pipeline.config.embedding import Embed, Evaluate
from pipeline.config.network import Head, IbotHead, Model
from pipeline.config.run import Export, Resources, Run, Track
from pipeline.config.section import Section
from pipeline.config.training import Distill, Loss, Optim, Teacher, Train
from pipeline.config.use import Look, Search, Serve, Start

# What `objective=dino` means where a recipe does not say it (Caron et al. 2021, section 3 and
# table 8 of its appendix).
DINO: dict[str, dict[str, Any]] = {
    "loss": {"ibot_weight": 0.0, "koleo_weight": 0.0, "mask_probability": 0.0},
    "teacher": {"momentum": 0.996},
    "augment": {"global_scale": (0.4, 1.0), "local_scale": (0.05, 0.4)},
}
# Distillation hides nothing and drops nothing (DINOv2 paper, section 5), unless our own objective
# stands beside it.
DISTILLATION: dict[str, dict[str, Any]] = {
    "loss": {"mask_probability": 0.0},
    "model": {"drop_path": 0.0},
}


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
    adapt: Adapt = Adapt()
    guard: Guard = Guard()
    curate: Curate = Curate()
    quality: Quality = Quality()
    dedup: Dedup = Dedup()
    leaks: Leaks = Leaks()
    retrieve: Retrieve = Retrieve()
    balance: Balance = Balance()
    mix: Mix = Mix()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    finetune: Finetune = Finetune()
    embed: Embed = Embed()
    search: Search = Search()
    look: Look = Look()
    serve: Serve = Serve()
    start: Start = Start()
    track: Track = Track()
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """What an objective or a preset sets where the recipe says nothing."""
        if not isinstance(values, dict):
            return values
        sections = {name: value for name, value in values.items() if isinstance(value, dict)}
        curate = sections.get("curate", {})
        preset = preset_values(*(str(curate.get(n, "")) for n in ("preset", "copy_embedder")))
        for applies, defaults in (
            (values.get("objective") == "dino", DINO),
            (_alone(sections.get("distill", {})), DISTILLATION),
            (True, preset),
        ):
            for name, fields in defaults.items() if applies else ():
                # what is there and is no mapping stays as it is: its section refuses it
                if name in sections or name not in values:
                    sections[name] = fields | sections.get(name, {})
        return values | sections

    @model_validator(mode="after")
    def _terms(self) -> Config:
        loss, alone = self.loss, self.distill.alone
        if self.objective == "dino" and (loss.ibot_weight or loss.koleo_weight):
            raise ValueError(
                f"objective=dino has no iBOT and no KoLeo, but loss.ibot_weight={loss.ibot_weight} "
                f"and loss.koleo_weight={loss.koleo_weight}; set both to 0 or use objective=dinov2"
            )
        if self.objective == "dino" and loss.mask_probability:
            raise ValueError("objective=dino hides nothing; set loss.mask_probability=0")
        if self.objective == "dino" and alone:
            raise ValueError(
                "objective=dino is our own objective, and a frozen teacher stands in its place; "
                "set distill.objective=true for both, or leave distill.teacher empty"
            )
        if alone and loss.mask_probability:
            raise ValueError(
                "distillation hides nothing; set loss.mask_probability=0 (or "
                "distill.objective=true, for iBOT beside it)"
            )
        if loss.ibot_weight and not loss.mask_probability and not alone:
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
        if self.evaluate.gpu_share and self.resources.gpus_per_worker < 1:
            raise ValueError(
                f"evaluate.gpu_share={self.evaluate.gpu_share:g} takes a part of a worker's GPU, "
                f"but with resources.gpus_per_worker={self.resources.gpus_per_worker:g} workers "
                "share one; set one of them back"
            )
        if self.export.onnx_sizes and not self.export.onnx:
            raise ValueError("export.onnx_sizes names sizes of ONNX, but export.onnx is false")
        if self.train.tune != "all" and not self.model.init:
            raise ValueError(
                f"train.tune={self.train.tune} freezes weights, but model.init is empty: random "
                "weights would stay random; name weights with model.init or set train.tune=all"
            )
        if self.train.batch_norm == "kept" and not self.model.init:
            raise ValueError(
                "train.batch_norm=kept keeps the running means of weights, but model.init is "
                "empty; name weights with model.init or set train.batch_norm=batch"
            )
        if self.train.batch_norm == "kept" and self.model.encoder == "dinov2":
            raise ValueError(
                "train.batch_norm=kept, but a ViT of ours has no BatchNorm; leave it out, or name "
                "the encoder of the weights: model.encoder=timm:… or module:…"
            )
        if self.train.tune == "heads" and self.distill.alone and self.distill.loss != "targets":
            raise ValueError(
                f"train.tune=heads freezes the backbone, and distill.loss={self.distill.loss} may "
                "learn features, for which no heads are built, so nothing that is kept would "
                "learn; set distill.objective=true, distill.loss=targets or "
                "train.tune=last_blocks=2"
            )
        if self.model.init_resize and not self.model.init:
            raise ValueError("model.init_resize=true, but model.init is empty: nothing to resize")
        guard = self.guard
        if guard.keep and not guard.is_on(self.model.init):
            raise ValueError(
                "guard.keep names images, but the guard is off, so nothing is measured on them; "
                "set guard.enabled=true or model.init"
            )
        scores = [name for name in self.evaluate.choosing() if name != "rank_me"]
        if guard.score and guard.score not in scores:
            raise ValueError(
                f"guard.score={guard.score} cannot be compared image by image while training; "
                f"these can: {', '.join(scores)}"
            )
        return self

    @model_validator(mode="after")
    def _curated(self) -> Config:
        if sentences := problems(self):
            raise ValueError("\n".join(sentences))
        return self

    @model_validator(mode="after")
    def _channels(self) -> Config:
        channels = self.model.in_channels
        if self._waits_for("in_channels"):
            return self
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
        if self._waits_for("patch_size"):
            return self
        features = self.distill.alone and self.distill.loss != "targets"
        if self.model.encoder != "dinov2" and (features or not self.loss.ibot_weight):
            return self  # an encoder that may have no patches: it says itself what it takes
        for name, size in (
            ("augment.global_size", self.augment.global_size),
            ("augment.local_size", self.augment.local_size if self.augment.local_crops else patch),
            ("evaluate.image_size", self.evaluate.own_image_size or patch),
        ):
            if size % patch:
                raise ValueError(
                    f"{name}={size} is not a multiple of model.patch_size={patch}; "
                    f"the nearest is {max(1, round(size / patch)) * patch}"
                )
        return self

    def _waits_for(self, name: str) -> bool:
        """Whether a field of the model is yet to be read off the weights (`adapt.enabled`)."""
        return self.adapt.enabled and name not in self.model.model_fields_set


def _alone(distill: dict[str, Any]) -> bool:
    """`Distill.alone` of a section that is not checked yet."""
    return bool(distill.get("teacher")) and distill.get("objective") in (None, False, "false")
