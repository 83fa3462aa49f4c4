"""From the recipe to the objects that train: the one place that maps config fields to parts."""

from __future__ import annotations

from torch.nn import Module

from pipeline.config import Config
from pipeline.data.crops import CropSpec
from pipeline.data.photometric import PhotometricSpec
from pipeline.model.pair import BackboneSpec, HeadSpec, Pair, build_pair
from pipeline.plan import Plan
from pipeline.train.cost import Cost, estimate
from pipeline.train.step import Objective, ObjectiveSpec

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
    )


def pair(config: Config) -> Pair:
    """Student and teacher at step 0: the same on every worker, from the run's seed."""
    dino = HeadSpec(**config.head.model_dump())
    ibot = config.ibot_head.model_dump(exclude={"separate"})
    separate = HeadSpec(**ibot) if config.ibot_head.separate else None
    return build_pair(backbone_spec(config), dino, separate, config.run.seed)


def objective(config: Config, built: Pair) -> Objective:
    """The losses with their centres."""
    loss = config.loss
    spec = ObjectiveSpec(
        dino_weight=loss.dino_weight,
        ibot_weight=loss.ibot_weight,
        koleo_weight=loss.koleo_weight,
        student_temperature=loss.student_temperature,
        centring=loss.centring,
        centre_momentum=loss.centre_momentum,
        clip=config.optim.clip,
    )
    return Objective.for_pair(spec, built)


def crop_spec(config: Config) -> CropSpec:
    """What the CPU tasks cut."""
    augment = config.augment
    return CropSpec(
        global_size=augment.global_size,
        local_size=augment.local_size,
        local_crops=augment.local_crops,
        global_scale=augment.global_scale,
        local_scale=augment.local_scale,
        flip_probability=augment.flip,
    )


def photometric_spec(config: Config) -> PhotometricSpec:
    """What the training device does to colours."""
    augment = config.augment
    return PhotometricSpec(
        jitter_probability=augment.jitter,
        greyscale_probability=augment.greyscale,
        blur_probability=BLUR[augment.blur],
        solarize_probability=(0.0, augment.solarize, 0.0),
        mean=augment.mean,
        std=augment.std,
    )


def compile_blocks(pair: Pair) -> None:
    """Compiles the blocks, whose shapes do not change from step to step, one by one."""
    for encoder in (pair.student, pair.teacher):
        for block in encoder.backbone.blocks:
            block.compile(dynamic=None)


def estimated_cost(plan: Plan, built: Pair) -> Cost:
    """Parameters, FLOPs, memory and disk of a plan."""
    config, student = plan.config, built.student
    width, depth, _ = config.model.dimensions
    extra = 1 + config.model.registers
    side = config.augment.local_size // config.model.patch_size
    dino, ibot = _parameters(student.dino_head), _parameters(student.ibot_head)
    backbone_parameters = _parameters(student.backbone)
    masked = config.loss.mask_probability * sum(config.loss.mask_ratio) / 2
    patches = plan.grid[0] * plan.grid[1]
    return estimate(
        backbone_parameters + dino + ibot,
        backbone_parameters,
        width=width,
        depth=depth,
        tokens_global=patches + extra,
        tokens_local=side * side + extra,
        local_crops=config.augment.local_crops,
        prototypes=config.head.prototypes,
        head_parameters=dino,
        patch_prototypes=(config.ibot_head if ibot else config.head).prototypes,
        patch_head_parameters=ibot or dino,
        masked_patches=2 * patches * masked if config.loss.ibot_weight else 0.0,
        micro_batch=plan.micro_batch,
        view_bytes=plan.view_bytes,
        half=plan.precision == "bfloat16",
    )


def _parameters(module: Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0
