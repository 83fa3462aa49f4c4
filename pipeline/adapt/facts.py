"""What weights say of themselves: the network, the images that they take, whether heads come along.

`facts_of` opens what `model.init` names, as training will, and gives fields of the config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config.config import Config
from pipeline.embed.load import (
    EXPORTS,
    TIMM,
    load_weights,
    preprocessing_of,
    timm_facts,
    weights_at,
)
from pipeline.errors import ConfigError, PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.storage.places import absolute_uri
from pipeline.uri import is_uri, public

PREFIX = "module:"
LOCAL_DIR = "local-dir:"  # timm's word for a folder
# What a run of ours goes on with: it was trained so, and its heads fit nothing else.
OF_A_RUN = {
    "model": ("encoder", "size", "width", "depth", "heads", "patch_size", "in_channels",
              "mlp_ratio", "ffn", "registers", "layer_scale", "interpolate_offset",
              "interpolate_antialias"),
    "head": None,
    "ibot_head": None,
    "augment": None,
    "loss": ("centring", "ibot_weight", "koleo_weight", "mask_probability", "mask_ratio"),
}  # fmt: skip
OF_A_STUDENT = ("model",)  # of features: there are no heads that the others belong to


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


def facts_of(config: Config) -> Facts:
    """The facts of the weights in `model.init`.

    Raises:
        PipelineError: no weights are named, or nothing that can be read is there.
    """
    init = config.model.init
    if not init:
        raise ConfigError(
            "no weights to adapt: model.init is empty",
            "name them: python jobs/adapt.py WEIGHTS PHOTOS/, where WEIGHTS is a file or folder of "
            "weights, timm:<name>, or a run",
        )
    chosen = config.model.encoder if "encoder" in config.model.model_fields_set else ""
    return _facts(init, chosen)


@lru_cache(2)  # asked for by the start, the stage and its key
def _facts(init: str, encoder: str) -> Facts:
    if init.startswith(TIMM) and LOCAL_DIR not in init:
        _, known = timm_facts(init.removeprefix(TIMM))  # it has the weights, or says why not
        return _of_timm(init, init, known)
    if init.startswith(TIMM):
        init = absolute_uri(init.removeprefix(TIMM).removeprefix(LOCAL_DIR))
    if facts := _of_run(init):
        return facts
    path = weights_at(init)
    if is_uri(path):
        raise PipelineError(
            f"model.init={public(path)} holds no checkpoint of ours",
            "at a URI, name a run folder or a folder checkpoints/step-…; download other weights",
        )
    known = _preprocessing(path)
    if encoder.startswith(TIMM):
        return _of_timm(encoder, path, known)
    if name := _architecture(path):
        try:
            return _of_vit(path, known)
        except PipelineError:  # another kind of network than ours
            return _of_timm(f"{TIMM}{name}", path, known)
    return _of_vit(path, known)


def _preprocessing(path: str) -> Preprocessing:
    """What is written beside the weights; beside those of an export of ours in DINOv2's form
    nothing is, and its other forms say it.
    """
    place = Path(path)
    if not place.exists():
        return Preprocessing()
    known = preprocessing_of(path)
    if known.mean or place.name != EXPORTS[0]:
        return known
    beside = [place.parent / name for name in EXPORTS[1:]]
    said = [preprocessing_of(str(one)) for one in beside if one.is_dir()]
    return next((one for one in said if one.mean), known)


def _architecture(path: str) -> str:
    """The timm model that a folder says it is of; "" where it says none."""
    from pipeline.model.read import read_json

    file = Path(path) / "config.json"
    return str(read_json(file).get("architecture") or "") if file.is_file() else ""


def _of_run(init: str) -> Facts | None:
    """The best checkpoint of a run of ours, heads included."""
    from pipeline.plan.resume import plan_of
    from pipeline.train.start import checkpoint_at, encoder_of

    saved = None if Path(init).is_file() else checkpoint_at(init)
    if saved is None:
        return None
    plan = plan_of(saved.meta, saved.path)
    config, trained = plan.config, not plan.headless  # a student of features alone has no heads
    backbone = encoder_of(saved)[0].backbone
    values: dict[str, Any] = {}
    for section, names in OF_A_RUN.items():
        if not trained and section not in OF_A_STUDENT:
            continue
        fields = getattr(config, section).model_dump(mode="json")
        values |= {
            f"{section}.{name}": value
            for name, value in fields.items()
            if (names is None or name in names) and value is not None
        }
    if not trained:
        augment = config.augment
        values |= {"augment.mean": list(augment.mean), "augment.std": list(augment.std)}
    side = config.augment.global_size
    patches = _patches(backbone)
    return Facts(
        init=init,
        what=f"a run of ours {'with its' if trained else 'without'} heads, step {saved.step:,}",
        values=values,
        image_size=side,
        own_grid=side if patches else None,
        patch_size=patches,
        width=backbone.width,
        depth=_depth(backbone),
        has_layers=_has_layers(backbone),
        has_heads=trained,
        parameters=_parameters(backbone),
        batch_norm=config.train.batch_norm == "kept",  # else its own means moved, and go on
    )


def _of_vit(path: str, known: Preprocessing) -> Facts:
    """Weights of a vision transformer of DINOv2's kind."""
    from pipeline.model.encoders.module import ModuleBackbone
    from pipeline.model.fit import Facts as Shapes
    from pipeline.model.foreign import TimmBackbone

    backbone = load_weights(path)
    if isinstance(backbone, TimmBackbone):  # that we exported
        return _of_timm(f"{TIMM}{backbone.spec.name}", path, known)
    if isinstance(backbone, ModuleBackbone):
        return _of_module(backbone, path, known)
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
        values=values | _normalisation(known),
        image_size=known.image_size or grid,
        own_grid=grid,
        patch_size=shapes.patch_size,
        width=shapes.width,
        depth=shapes.depth,
        has_layers=True,
        has_heads=False,
        parameters=_parameters(backbone),
    )


def _of_module(backbone: Any, path: str, known: Preprocessing) -> Facts:
    """An exported encoder of somebody's own module."""
    spec, patches = backbone.spec, _patches(backbone)
    values = {
        "model.encoder": f"{PREFIX}{spec.name}",
        "model.patch_size": spec.patch_size,
        "model.in_channels": spec.in_channels,
    }
    return Facts(
        init=path,
        what=f"{PREFIX}{spec.name}, {'patches of ' + str(patches) if patches else 'no patches'}",
        values=values | _normalisation(known),
        image_size=spec.image_size,  # of its training; beside the weights stands that of its use
        own_grid=None,
        patch_size=patches,
        width=backbone.width,
        depth=_depth(backbone.module),
        has_layers=False,
        has_heads=False,
        parameters=_parameters(backbone),
        batch_norm=_has_running_means(backbone),
    )


def _of_timm(encoder: str, init: str, known: Preprocessing) -> Facts:
    """A timm model, by its name; `known` is what stands beside the weights."""
    from pipeline.model.foreign import timm_by_name

    backbone = timm_by_name(encoder.removeprefix(TIMM))
    usual: Any = backbone.module.pretrained_cfg
    size = known.image_size or int(usual["input_size"][-1])
    patches = _patches(backbone)
    values = {
        "model.encoder": encoder,
        "model.patch_size": patches or 1,
        "model.in_channels": len(known.mean) or int(usual["input_size"][0]),
        "augment.mean": list(known.mean or usual["mean"]),
        "augment.std": list(known.std or usual["std"]),
    }
    return Facts(
        init=init,
        what=f"{encoder}, {'patches of ' + str(patches) if patches else 'no patch tokens'}",
        values=values,
        image_size=size,
        own_grid=backbone.spec.image_size if patches else None,
        patch_size=patches,
        width=backbone.width,
        depth=_depth(backbone.module),
        has_layers=backbone.has_layers,
        has_heads=False,
        parameters=_parameters(backbone),
        batch_norm=_has_running_means(backbone),
    )


def _normalisation(known: Preprocessing) -> dict[str, Any]:
    if not known.mean:
        return {}
    return {"augment.mean": list(known.mean), "augment.std": list(known.std)}


def _patches(backbone: Any) -> int:
    """Side of a patch where there are tokens that can be hidden, else 0."""
    hidden = getattr(backbone, "has_patches", True) and getattr(backbone, "takes_masks", True)
    return int(backbone.patch_size) if hidden else 0


def _depth(backbone: Any) -> int:
    blocks = getattr(backbone, "blocks", None)
    if blocks is None or not len(blocks) or not hasattr(blocks[0], "attn"):
        return 0
    return len(blocks)


def _has_layers(backbone: Any) -> bool:
    return bool(getattr(backbone, "has_layers", True))


def _has_running_means(backbone: Any) -> bool:
    from pipeline.train.tune.choose import with_running_means

    return bool(with_running_means(backbone))


def _parameters(backbone: Any) -> int:
    return sum(x.numel() for x in backbone.parameters())
