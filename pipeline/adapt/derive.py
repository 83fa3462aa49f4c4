"""Which recipe goes with given weights and a number of images: each value with its reason.

Starting points are published ones (DINOv2's short recipe, its continuation at high resolution);
what small sets and short runs need instead was measured (benchmarks/adapt.py, docs/adapt.md).
Nothing here depends on the machine but the length of a run without a GPU, so that the same weights
and images give the same recipe on the next call.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from pipeline.adapt.networks import Facts
from pipeline.adapt.recipe import Line, Recipe, Whose, is_set
from pipeline.config.config import Config

# Of pretraining, for 1,024 images a step: of transformers as in configs/vits14.yaml, of
# convolutional networks as in configs/cifar10.yaml, where 128 images have 3e-3.
RATE, RATE_OF_CONVOLUTIONS = 2e-3, 8e-3
# A tenth as published for transformers. A convolutional network with BatchNorm learnt next to
# nothing at a tenth, and forgot nothing at a third (docs/adapt.md).
PART_OF_RATE, PART_OF_CONVOLUTIONS = 0.1, 1 / 3
USUAL_SIDE = 224  # pixels; DINOv2 trains most of its steps at this size
LOCAL = 98 / 224  # side of a local crop over that of a global one
SMALL_SIDE = 64  # pixels: below it blur and solarize erase most of an image
FEW, SOME, MANY = 2_000, 50_000, 1_000_000  # images
BLOCKS_TUNED = 4  # the last ones, of few images


class Derivation:
    """Lines of a recipe, as they are decided one after the other.

    Args:
        config: what the user set, which stays.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.lines: list[Line] = []

    def take(self, field: str, value: Any, reason: str, whose: Whose = "images") -> Any:
        """Decides a field; the answer is the user's value where there is one."""
        if is_set(self.config, field):
            section, _, name = field.partition(".")
            yours = getattr(getattr(self.config, section), name)
            yours = list(yours) if isinstance(yours, tuple) else yours
            value, reason, whose = yours, "as you set it", "yours"
        for line in self.lines:
            if line.field == field:  # the weights have said it
                return line.value
        self.lines.append(Line(field, value, reason, whose))
        return value


def derive(config: Config, facts: Facts, images: int, gpu: bool) -> Recipe:
    """The recipe.

    Args:
        config: with what the user set, and nothing derived.
        facts: of the weights.
        images: that are trained on.
        gpu: training has GPUs.
    """
    lines = Derivation(config)
    take = lines.take
    for field, value in facts.values.items():
        yours = take(field, value, "read off the weights", "weights")
        if field.startswith("head.") and yours != value:
            facts = replace(facts, has_heads=False)  # those of another shape are new ones
    small = _views(lines, facts, gpu) <= SMALL_SIDE
    batch = take("optim.global_batch_size", *_batch(images))
    steps = _length(lines, images, batch, 1.0 if gpu else 0.5 if small else 0.25)
    _heads(lines, facts, images, steps)
    _rates(lines, facts, images, steps)
    _teacher(lines, steps)
    _network(lines, facts, images)
    take("train.eval_every", max(1, math.ceil(steps / 10)), "ten times, for the guard to compare")
    take("train.save_every", max(1, math.ceil(steps / 10)), "as often: any of them may be the best")
    return Recipe(tuple(lines.lines))


def facts_alone(config: Config, facts: Facts) -> Recipe:
    """What is known before the images are: the fields that follow from the weights."""
    recipe = derive(config, facts, images=1, gpu=True)
    return Recipe(tuple(line for line in recipe.lines if line.whose == "weights"))


def _batch(images: int) -> tuple[int, str]:
    """Images a step: a power of two."""
    most = 1024 if images >= MANY else 256 if images >= SOME else 128
    batch = min(most, max(16, 2 ** int(math.log2(max(2, images / 8)))))
    if batch > images:
        return max(1, images), "all images are one step"
    return batch, f"an eighth of {images:,} images or less, 16 to {most}"


def _length(lines: Derivation, images: int, batch: int, part: float) -> int:
    """Steps of the run, as the user set them in whatever way, or by the number of images; without a
    GPU a part of that.
    """
    config = lines.config
    a_pass = max(1, images // batch)
    if is_set(config, "optim.passes"):
        passes = float(config.optim.passes or 1)
        lines.take("optim.passes", passes, "as you set it")
        return max(1, round(passes * a_pass))
    passes = min(100.0, 100 * (600 / max(1, images)) ** 0.4)
    why = f"{passes:.0f} passes: few images are seen more often, many need fewer"
    if part < 1:
        passes *= part
        share = "half" if part == 0.5 else "a quarter"
        why = f"{passes:.3g} passes, {share} of what a GPU would get"
    steps = max(100, round(passes * a_pass))
    return int(lines.take("optim.steps", steps, why))


def _views(lines: Derivation, facts: Facts, gpu: bool) -> int:
    """Sizes of crops and what is done to their colours; the side of a global crop."""
    take, patch = lines.take, facts.patch_size or 1
    own = facts.image_size or USUAL_SIDE
    side, why = own, f"the weights' own {own} pixels"
    if not facts.image_size:
        why = "nothing says what size the weights are for; this is the usual one"
    if own > 256 and not facts.has_heads:
        side = max(1, round(USUAL_SIDE / patch)) * patch
        why = f"the weights are for {own}; most of DINOv2's training is at {USUAL_SIDE}"
    side = int(take("augment.global_size", side, why, "weights"))
    if facts.own_grid and facts.own_grid != side:
        why = f"position embeddings are for {facts.own_grid} pixels"
        take("model.init_resize", True, why, "weights")
    if facts.has_heads:
        return side
    small = side <= SMALL_SIDE
    unit = patch if facts.patch_size else 32 if not small else 4
    local = max(1, round(side * LOCAL / unit)) * unit
    take("augment.local_size", local, "the same part of an image as 98 of 224 pixels", "weights")
    if small and not facts.patch_size:
        number, why = 0, "local crops did not pay for small images and no patches"
    else:
        number, why = (8, "as DINOv2") if gpu else (2, "fewer than DINOv2's 8: there is no GPU")
    take("augment.local_crops", number, why)
    if small:
        take("augment.blur", "none", f"it would erase most of {side} pixels", "weights")
        take("augment.solarize", 0.0, f"it would erase most of {side} pixels", "weights")
    return side


def _heads(lines: Derivation, facts: Facts, images: int, steps: int) -> None:
    """Fresh heads, their size, and how long they learn alone."""
    take = lines.take
    if facts.has_heads:
        take("train.freeze_backbone_steps", 0, "trained heads come along", "weights")
        return
    prototypes = 2 ** round(math.log2(min(65536, max(256, images / 16))))
    take("head.prototypes", prototypes, "one for about 16 images, 256 to 65,536")
    if images < SOME * 2:
        take("head.hidden", 512, "a small head learns in few steps")
        take("head.bottleneck", 64, "a small head learns in few steps")
    if not facts.patch_size:
        take(
            "head.norm",
            "batch",
            "with it convolutional networks learnt more (configs/cifar10.yaml)",
        )
    frozen = min(1000, max(1, steps // 10))
    why = "fresh heads learn alone first, so that they do not disturb the backbone"
    take("train.freeze_backbone_steps", frozen, why)


def _rates(lines: Derivation, facts: Facts, images: int, steps: int) -> None:
    """The learning rate of each part, its ramp, and weight decay."""
    take = lines.take
    if facts.patch_size:
        why = f"a tenth of {RATE:g}, that of pretraining, x sqrt(batch / 1024)"
        take("optim.lr", PART_OF_RATE * RATE, why)
    else:
        why = f"a third of {RATE_OF_CONVOLUTIONS:g}, that of pretraining, x sqrt(batch / 1024)"
        take("optim.lr", round(PART_OF_CONVOLUTIONS * RATE_OF_CONVOLUTIONS, 5), why)
    take("optim.warmup", 0.2, "a long ramp, most of it after the backbone is let go")
    if facts.has_layers:
        why = "first layers, which fit any image, move least"
        take("optim.layerwise_decay", 0.9 if images >= FEW else 0.75, why)
    else:
        why = "the layers of this network are not known"
        take("optim.layerwise_decay", 1.0, why, "weights")
    if facts.depth:
        part, why = (0.2, "as DINOv2") if images >= FEW else (0.0, f"frozen below {FEW:,} images")
        take("optim.patch_embed_lr", part, why)
    take("optim.weight_decay_end", 0.1, "little: what the weights know shall not decay")
    if steps < 10_000:
        take("optim.freeze_last_layer", 0.0, "prototypes are few and the run is short")


def _teacher(lines: Derivation, steps: int) -> None:
    """How fast the teacher follows, and how sharp its targets are."""
    take = lines.take
    momentum = 0.994 if steps >= 10_000 else 0.99 if steps >= 500 else 0.98
    take("teacher.momentum", momentum, f"its memory is a small part of {steps:,} steps")
    if steps < 10_000:
        take("teacher.temperature_end", 0.04, "a short run keeps sharp targets from the start on")


def _network(lines: Derivation, facts: Facts, images: int) -> None:
    """What of the objective this network can do, and how much of it is trained."""
    take = lines.take
    if not facts.has_heads:
        take("loss.centring", "sinkhorn", "a centre by averages needs large batches and long runs")
        if not facts.patch_size:
            why = "no patch tokens to hide, so no iBOT"
            take("loss.ibot_weight", 0.0, why, "weights")
            take("loss.mask_probability", 0.0, why, "weights")
    if facts.batch_norm:
        why = "with the means of other crops they were another network before anything was learnt"
        take("train.batch_norm", "kept", why, "weights")
    drop = 0.1 if facts.depth >= 12 and images >= FEW else 0.0
    take("model.drop_path", drop, "every block is needed to keep what the weights know")
    if facts.depth > BLOCKS_TUNED and images < FEW and not facts.has_heads:
        why = f"below {FEW:,} images the first blocks stay as they are"
        take("train.tune", f"last_blocks={BLOCKS_TUNED}", why)
