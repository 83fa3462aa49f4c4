"""From the recipe to the objects that train: the one place that maps config fields to parts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from pipeline.config.config import Config
from pipeline.errors import PipelineError
from pipeline.loss.features import FeatureLoss
from pipeline.model.encoders.module import ModuleSpec
from pipeline.model.encoders.source import PREFIX, Name, read_source
from pipeline.model.foreign import ForeignBackbone, TimmSpec, check_sizes
from pipeline.model.pair import HeadSpec, Pair, Spec, build_pair
from pipeline.model.vit import BackboneSpec, VisionTransformer
from pipeline.plan.plan import Plan, evaluation_size
from pipeline.train.ahead import ViewMaker
from pipeline.train.distil.features import FeatureSpec
from pipeline.train.parallel.strategy import Layout
from pipeline.train.step import Objective, ObjectiveSpec
from pipeline.train.tune.choose import tuned
from pipeline.views.batch import Apply
from pipeline.views.crops import CropSpec
from pipeline.views.masked import PatchFinder, usual_length
from pipeline.views.masks import MaskSpec
from pipeline.views.photometric import CompiledPhotometric, PhotometricSpec, apply_photometric

BLUR = {
    "paper": (1.0, 0.1, 0.5),
    "released": (0.0, 0.9, 0.5),
    "none": (0.0, 0.0, 0.0),
}  # RECIPE sections 0 and 4


def backbone_spec(config: Config) -> BackboneSpec:
    """The backbone of a recipe; its position embeddings have the grid of the global crop."""
    model = config.model
    width, depth, heads = model.dimensions
    return BackboneSpec(
        image_size=config.augment.global_size,
        patch_size=model.patch_size,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=model.mlp_ratio,
        ffn=model.ffn,
        registers=model.registers,
        layer_scale=model.layer_scale,
        drop_path=model.drop_path,
        in_channels=model.in_channels,
        interpolate_offset=model.interpolate_offset,
        interpolate_antialias=model.interpolate_antialias,
    )


def encoder_spec(config: Config, files: Mapping[str, str] | None = None) -> Spec:
    """Our ViT, the timm model that `model.encoder` names, or what its module makes.

    Args:
        config: the recipe.
        files: text of the module, as a plan has it; without it that of this machine.
    """
    model = config.model
    if model.encoder == "dinov2":
        return backbone_spec(config)
    sizes: dict[str, Any] = {
        "image_size": config.augment.global_size,
        "patch_size": model.patch_size,
        "in_channels": model.in_channels,
        "drop_path": model.drop_path,
    }
    if not model.encoder.startswith(PREFIX):
        return TimmSpec(model.encoder.removeprefix("timm:"), **sizes)
    text = files or read_source(Name.of(model.encoder))
    return ModuleSpec(model.encoder.removeprefix(PREFIX), **sizes, files=text)


def pair(config: Config, files: Mapping[str, str] | None = None, heads: bool = True) -> Pair:
    """Student and teacher with random weights: the same on every worker, from the run's seed.

    Args:
        config: the recipe.
        files: as for `encoder_spec`.
        heads: False where nothing but features is learnt.

    Raises:
        PipelineError: a foreign encoder does not exist or does not do what the recipe asks for.
    """
    exact = config.train.logits == "float32"
    dino = HeadSpec(**config.head.model_dump(), float32=exact)
    ibot = config.ibot_head.model_dump(exclude={"separate"})
    separate = HeadSpec(**ibot, float32=exact) if config.ibot_head.separate else None
    dino_head, ibot_head = (shape if heads else None for shape in (dino, separate))
    built = build_pair(encoder_spec(config, files), dino_head, ibot_head, config.run.seed)
    backbone = built.student.backbone
    if isinstance(backbone, ForeignBackbone):
        augment = config.augment
        masked = heads and (config.loss.ibot_weight or config.loss.mask_probability)
        if masked and not (backbone.has_patches and backbone.takes_masks):
            raise PipelineError(
                f"{config.model.encoder} has no patch tokens to hide, which iBOT needs",
                "set loss.ibot_weight=0 and loss.mask_probability=0",
            )
        if config.optim.layerwise_decay < 1 and not backbone.has_layers:
            raise PipelineError(
                f"the layers of {config.model.encoder} are not known, which "
                f"optim.layerwise_decay={config.optim.layerwise_decay} needs",
                "set optim.layerwise_decay=1",
            )
        sizes = {augment.global_size, evaluation_size(config)}
        sizes |= {augment.local_size} if augment.local_crops and heads else set()
        check_sizes(backbone, config.model.in_channels, sorted(sizes))
    return built


def for_estimate(plan: Plan) -> Pair:
    """The networks of a `located` plan, for its cost, with what `train.tune` lets learn: on GPUs a
    ViT of ours has shapes alone, which take no time and no memory. On CPUs networks are small, and
    an estimate runs a part of them.

    Raises:
        PipelineError: as `pair` and `tuned`.
    """
    config = plan.config
    shapes = plan.device == "cuda" and config.model.encoder == "dinov2"
    with torch.device("meta") if shapes else nullcontext():
        return tuned(pair(config, plan.encoder_files, not plan.headless), config)


def feature_spec(plan: Plan) -> FeatureSpec:
    """How features of a frozen teacher are learnt; of a plan that does."""
    settings = plan.config.distill
    form: FeatureLoss = "smooth_l1" if plan.distil_loss == "smooth_l1" else "cosine"
    return FeatureSpec(form, settings.cls_weight, settings.patch_weight)


def objective(config: Config, built: Pair, features: FeatureSpec | None = None) -> Objective:
    """The losses with their centres.

    Args:
        config: the recipe.
        built: a pair without heads learns features alone.
        features: how, where the pair has a teacher of features.
    """
    loss = config.loss
    heads = built.student.dino_head is not None
    spec = ObjectiveSpec(
        dino_weight=loss.dino_weight * heads,
        ibot_weight=loss.ibot_weight * heads,
        koleo_weight=loss.koleo_weight * heads,
        student_temperature=loss.student_temperature,
        centring=loss.centring,
        centre_momentum=loss.centre_momentum,
        distil=config.distill.alone,
        kernels=config.train.loss_kernels,
        clip=config.optim.clip,
        features=features,
    )
    return Objective.for_pair(spec, built)


def crop_spec(plan: Plan) -> CropSpec:
    """What the CPU tasks cut."""
    config, augment = plan.config, plan.config.augment
    return CropSpec(
        global_size=augment.global_size,
        local_size=augment.local_size,
        local_crops=plan.local_crops,
        global_scale=augment.global_scale,
        local_scale=augment.local_scale,
        flip_probability=augment.flip,
        channels=config.model.in_channels,
    )


def photometric_spec(config: Config) -> PhotometricSpec:
    """What the training device does to colours."""
    augment = config.augment
    brightness, contrast, saturation, hue = augment.jitter_strengths
    return PhotometricSpec(
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        jitter_probability=augment.jitter,
        greyscale_probability=augment.greyscale,
        blur_probability=BLUR[augment.blur],
        solarize_probability=(0.0, augment.solarize, 0.0),
        mean=augment.mean,
        std=augment.std,
    )


def photometric_function(plan: Plan, device: torch.device) -> Apply:
    """What changes colours: compiled where the networks are, and as it is on a CPU.

    One crop after the other is faster on a CPU than anything compiled (benchmarks/colour.py).
    """
    return CompiledPhotometric() if plan.compile and device.type != "cpu" else apply_photometric


def mask_spec(plan: Plan) -> MaskSpec:
    """Which patches the CPU tasks hide."""
    loss = plan.config.loss
    return MaskSpec(plan.grid, loss.mask_probability, loss.mask_ratio)


def view_maker(plan: Plan, built: Pair, device: torch.device) -> ViewMaker:
    """What makes views on the training device.

    Our ViT begins with a convolution, which autocast gives its input in bfloat16: views that are in
    it already give the same bits and take half the memory. Other networks may begin otherwise, and
    a teacher of features normalises them anew.
    """
    encoders = [encoder for encoder in (*built, built.frozen) if encoder]
    ours = all(isinstance(encoder.backbone, VisionTransformer) for encoder in encoders)
    half = ours and plan.precision == "bfloat16" and built.feature_teacher is None
    return ViewMaker(
        photometric_spec(plan.config),
        photometric_function(plan, device),
        device,
        torch.bfloat16 if half else torch.float32,
        patch_finder(plan),
    )


def patch_finder(plan: Plan) -> PatchFinder:
    """What finds the patches that iBOT scores; nearly every step has as many places."""
    spec = mask_spec(plan)
    if not plan.config.loss.ibot_weight or plan.headless:
        return PatchFinder(0)
    if plan.config.distill.alone:
        every = plan.micro_batch * spec.global_crops * spec.grid[0] * spec.grid[1]
        return PatchFinder(every, every=True)
    batch = plan.config.optim.global_batch_size
    return PatchFinder(usual_length(plan.micro_batch, batch, spec))


def layout(plan: Plan, device: torch.device) -> Layout:
    """How the workers of a plan hold the networks and compute."""
    train, half = plan.config.train, plan.precision == "bfloat16"
    return Layout(
        workers=plan.workers,
        device=device,
        strategy=train.strategy,
        precision=torch.bfloat16 if half else None,
        reduce=getattr(torch, train.reduce),
        residual=getattr(torch, train.residual),
        compile=plan.compile,
        checkpointing=train.activation_checkpointing,
    )
