"""What an opened network says of itself, and what stands beside its weights: facts of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.adapt.recipe import is_set
from pipeline.config.config import Config
from pipeline.embed.load import TIMM, load_weights
from pipeline.images.preprocessing import Preprocessing
from pipeline.images.value_range import FULL
from pipeline.uri import public

PREFIX = "module:"
OURS = "dinov2"  # model.encoder


@dataclass(frozen=True)
class Facts:
    """What is known of weights before they are trained on.

    Attributes:
        init: the same weights as training opens them: `model.init`.
        what: in words.
        values: fields of the config that follow from the weights alone.
        image_size: side of the images that they were made for, pixels; None: nobody says.
        own_grid: side of the images that position embeddings are for; None where there are none.
        patch_size: side of a patch, pixels; 0: the network has no patch tokens to hide.
        width: of a feature.
        depth: blocks of a transformer; 0 for other networks.
        has_layers: layers are known, for layerwise rates.
        has_heads: trained heads come along.
        parameters: of the backbone.
        batch_norm: its BatchNorm brings running means to keep: of weights that are done, or kept in
            their own training.
    """

    init: str
    what: str
    values: dict[str, Any]
    image_size: int | None
    own_grid: int | None
    patch_size: int
    width: int
    depth: int
    has_layers: bool
    has_heads: bool
    parameters: int
    batch_norm: bool = False


def of_vit(path: str, known: Preprocessing) -> Facts:
    """Weights of a vision transformer of DINOv2's kind."""
    from pipeline.model.encoders.module import ModuleBackbone
    from pipeline.model.fit import Facts as Shapes
    from pipeline.model.foreign import TimmBackbone

    backbone = load_weights(path)
    if isinstance(backbone, TimmBackbone):  # that we exported
        return of_timm(f"{TIMM}{backbone.spec.name}", path, known, backbone.state_dict())
    if isinstance(backbone, ModuleBackbone):
        return of_module(backbone, path, known)
    shapes = Shapes.of(backbone.state_dict())
    values = {
        "model.encoder": "dinov2",
        "model.width": shapes.width,
        "model.depth": shapes.depth,
        "model.heads": int(backbone.blocks[0].attn.heads),
        "model.patch_size": shapes.patch_size,
        "model.in_channels": shapes.in_channels,
        "model.mlp_ratio": shapes.mlp_ratio,
        "model.ffn": shapes.ffn,
        "model.registers": shapes.registers,
        "model.interpolate_offset": float(backbone.interpolate_offset),
        "model.interpolate_antialias": bool(backbone.interpolate_antialias),
    }
    grid = math.isqrt(shapes.patches) * shapes.patch_size
    return Facts(
        init=path,
        what=f"a ViT {shapes.width} x {shapes.depth}, patches of {shapes.patch_size}",
        values=values | of_images(known),
        image_size=known.image_size or grid,
        own_grid=grid,
        patch_size=shapes.patch_size,
        width=shapes.width,
        depth=shapes.depth,
        has_layers=True,
        has_heads=False,
        parameters=parameters_of(backbone),
    )


def of_module(backbone: Any, path: str, known: Preprocessing) -> Facts:
    """An encoder of somebody's own module."""
    spec, patches = backbone.spec, patches_of(backbone)
    values = {
        "model.encoder": f"{PREFIX}{spec.name}",
        "model.patch_size": spec.patch_size,
        "model.in_channels": spec.in_channels,
    }
    return Facts(
        init=path,
        what=f"{PREFIX}{spec.name}, {'patches of ' + str(patches) if patches else 'no patches'}",
        values=values | of_images(known),
        image_size=spec.image_size,  # of its training; beside the weights stands that of its use
        own_grid=None,
        patch_size=patches,
        width=backbone.width,
        depth=depth_of(backbone.module),
        has_layers=False,
        has_heads=False,
        parameters=parameters_of(backbone),
        batch_norm=_has_running_means(backbone),
    )


def of_own_module(
    config: Config, init: str, known: Preprocessing, state: Mapping[str, Any]
) -> Facts:
    """A module that the recipe names, with weights that say nothing of it.

    Args:
        config: the recipe; what it says of sizes is what the module is made with.
        init: the weights.
        known: what stands beside them.
        state: their tensors.

    Raises:
        PipelineError: there is no such module, or the tensors are not its own.
    """
    from pipeline.model.encoders.module import ModuleSpec
    from pipeline.model.foreign_weights import fit_foreign
    from pipeline.train.build import encoder_spec

    spec = encoder_spec(config)
    assert isinstance(spec, ModuleSpec)
    if known.mean and not is_set(config, "model.in_channels"):
        spec = replace(spec, in_channels=len(known.mean))
    if known.image_size and not is_set(config, "augment.global_size"):
        spec = replace(spec, image_size=known.image_size)
    backbone = spec.build()
    fit_foreign(backbone, state, public(init))
    return replace(of_module(backbone, init, known), image_size=known.image_size)


def of_timm(
    encoder: str, init: str, known: Preprocessing, state: Mapping[str, Any] | None = None
) -> Facts:
    """A timm model, by its name.

    Args:
        encoder: `timm:<name>`.
        init: the weights.
        known: what stands beside them.
        state: their tensors; None: those of timm itself.

    Raises:
        PipelineError: there is no such model, or the tensors are of another one.
    """
    from pipeline.model.foreign import timm_by_name
    from pipeline.model.foreign_weights import fit_foreign

    name = encoder.removeprefix(TIMM)
    backbone = timm_by_name(name)
    usual: Any = backbone.module.pretrained_cfg
    if not known.mean:
        known = replace(known, mean=tuple(usual["mean"]), std=tuple(usual["std"]))
    size, grid = known.image_size, backbone.spec.image_size
    if state is None:
        channels = len(known.mean)
    else:
        channels = _channels(state, usual) or len(known.mean)
        if channels != backbone.spec.in_channels:
            backbone = timm_by_name(name, {"in_chans": channels})
        fit_foreign(backbone, state, public(init), resize=True)
        grid = _grid(state, backbone) or grid
        size = size or _grid(state, backbone)
    patches = patches_of(backbone)
    if len(known.mean) != channels:  # of timm's own weights, which see colours
        known = replace(known, mean=(), std=())
    values = {
        "model.encoder": encoder,
        "model.patch_size": patches or 1,
        "model.in_channels": channels,
    }
    return Facts(
        init=init,
        what=f"{encoder}, {'patches of ' + str(patches) if patches else 'no patch tokens'}",
        values=values | of_images(known),
        image_size=size or int(usual["input_size"][-1]),
        own_grid=grid if patches else None,
        patch_size=patches,
        width=backbone.width,
        depth=depth_of(backbone.module),
        has_layers=backbone.has_layers,
        has_heads=False,
        parameters=parameters_of(backbone),
        batch_norm=_has_running_means(backbone),
    )


def _channels(state: Mapping[str, Any], usual: Any) -> int:
    """Channels of images, by the shape of timm's first layer; 0 where it is not known."""
    name = usual.get("first_conv")
    if not isinstance(name, str):
        return 0
    first = state.get(f"{name}.weight", state.get(f"module.{name}.weight"))
    return int(first.shape[1]) if first is not None and first.ndim == 4 else 0


def _grid(state: Mapping[str, Any], backbone: Any) -> int | None:
    """Side of the images that position embeddings are for, pixels; None where no shape tells."""
    position = state.get("pos_embed", state.get("module.pos_embed"))
    if position is None or position.ndim != 3 or not backbone.stride:
        return None
    alone = getattr(backbone.module, "no_embed_class", False)
    patches = int(position.shape[1]) - (0 if alone else backbone.prefix_tokens)
    side = math.isqrt(max(0, patches))
    return side * int(backbone.stride) if side and side * side == patches else None


def of_images(known: Preprocessing) -> dict[str, Any]:
    """Fields that say how the images of a training were read: what is known of them."""
    values: dict[str, Any] = {}
    if known.mean:
        values = {"augment.mean": list(known.mean), "augment.std": list(known.std)}
    if known.value_range != FULL:  # which also stands for images of 8 bits
        values["data.range"] = list(known.value_range)
    return values


def patches_of(backbone: Any) -> int:
    """Side of a patch where there are tokens that can be hidden, else 0."""
    hidden = getattr(backbone, "has_patches", True) and getattr(backbone, "takes_masks", True)
    return int(backbone.patch_size) if hidden else 0


def depth_of(backbone: Any) -> int:
    """Blocks of a transformer; 0 for other networks."""
    blocks = getattr(backbone, "blocks", None)
    if blocks is None or not len(blocks) or not hasattr(blocks[0], "attn"):
        return 0
    return len(blocks)


def knows_layers(backbone: Any) -> bool:
    """Whether layers are known, for layerwise rates."""
    return bool(getattr(backbone, "has_layers", True))


def _has_running_means(backbone: Any) -> bool:
    from pipeline.train.tune.choose import with_running_means

    return bool(with_running_means(backbone))


def parameters_of(backbone: Any) -> int:
    """How many numbers a backbone has."""
    return sum(x.numel() for x in backbone.parameters())
