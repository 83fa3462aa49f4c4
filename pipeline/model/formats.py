"""What Hugging Face and timm read beside a backbone's weights, and where their models agree with
ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.images.preprocessing import Preprocessing
from pipeline.images.value_range import FULL, ValueRange
from pipeline.model.block import LAYER_NORM_EPS
from pipeline.model.vit import BackboneSpec
from pipeline.views.crops import evaluation_resize

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
FORMAT = "raydino-backbone-1"
MODELS = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


def huggingface_config(spec: BackboneSpec, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """`config.json` of `Dinov2Model`, or with registers of `Dinov2WithRegistersModel`."""
    kind = "dinov2_with_registers" if spec.registers else "dinov2"
    config: dict[str, Any] = {
        "architectures": [MODELS[kind]],
        "model_type": kind,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "mlp_ratio": int(spec.mlp_ratio),
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "num_channels": spec.in_channels,
        "use_swiglu_ffn": spec.ffn == "swiglu",
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": LAYER_NORM_EPS,
        "layerscale_value": spec.layer_scale,
        "drop_path_rate": 0.0,  # theirs is another stochastic depth; the weights need none
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "apply_layernorm": True,
        "reshape_hidden_states": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        # for us: transformers passes these over, and antialiases with registers only
        "interpolate_offset": spec.interpolate_offset,
        "interpolate_antialias": spec.interpolate_antialias,
    }
    if spec.registers:
        config["num_register_tokens"] = spec.registers
    return config


def preprocessor_config(images: Preprocessing) -> dict[str, Any]:
    """`preprocessor_config.json` for `AutoImageProcessor`: the pixels of `resize_centre_crop`, the
    recipe's mean and deviation.
    """
    size = known_size(images)
    side = evaluation_resize(size)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(images.mean) == 3,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
        **deep_key(images.value_range),
    }


def timm_config(spec: BackboneSpec, images: Preprocessing) -> dict[str, Any]:
    """`config.json` for `timm.create_model("local-dir:<folder>", pretrained=True)`.

    The named architecture only lends what JSON cannot say, the kind of feed-forward layer; sizes
    are all in `model_args`.
    """
    swiglu = spec.ffn == "swiglu"
    ratio = spec.mlp_ratio
    if swiglu:
        # timm wants the width of gate and value together; the half keeps int() from rounding down.
        inner = (int(int(spec.width * spec.mlp_ratio) * 2 / 3) + 7) // 8 * 8
        ratio = (2 * inner + 0.5) / spec.width
    size = "giant" if swiglu else {768: "base", 1024: "large"}.get(spec.width, "small")
    return {
        "architecture": f"vit_{size}_patch14_{'reg4_' if spec.registers else ''}dinov2",
        "num_classes": 0,
        "num_features": spec.width,
        "global_pool": "token",
        "model_args": {
            "img_size": spec.image_size,
            "patch_size": spec.patch_size,
            "in_chans": spec.in_channels,
            "embed_dim": spec.width,
            "depth": spec.depth,
            "num_heads": spec.heads,
            "mlp_ratio": ratio,
            "init_values": spec.layer_scale,
            "reg_tokens": spec.registers,
            "no_embed_class": spec.registers > 0,
            "dynamic_img_size": True,
            "num_classes": 0,
        },
        "pretrained_cfg": {
            **timm_transform(images),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def timm_transform(images: Preprocessing) -> dict[str, Any]:
    """What `timm.create_transform` needs for the pixels of `resize_centre_crop`, and what images of
    more than 8 bits are like, which timm does not read.
    """
    size = known_size(images)
    side = evaluation_resize(size)
    share = size / side
    if math.floor(size / share) < side:  # what timm resizes to
        share = math.nextafter(share, 0)
    return {
        "input_size": [len(images.mean), size, size],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": share,
        "crop_mode": "squash",  # the whole image, like a `size` of height and width elsewhere
        "mean": list(images.mean),
        "std": list(images.std),
        **deep_key(images.value_range),
    }


def known_size(images: Preprocessing) -> int:
    """The side of the images, pixels.

    Raises:
        ValueError: it is not said, and what is written beside weights must say it.
    """
    if images.image_size is None:
        raise ValueError("Preprocessing.image_size is None; give the side of the images, pixels")
    return images.image_size


def deep_key(value_range: ValueRange) -> dict[str, Any]:
    """What configs say of images of more than 8 bits: the values that become 0 and 255, before a
    library's processor sees them (`pipeline.images.value_range.to_bytes`). No library reads it.
    """
    return {} if value_range == FULL else {"value_range": list(value_range)}


def same_sizes(spec: BackboneSpec) -> tuple[bool, bool]:
    """Whether Hugging Face's and timm's model give our features at every size, not just at
    `spec.image_size`.

    All three resize position embeddings. Hugging Face antialiases them with registers only, timm
    always, and neither knows an offset.
    """
    plain = spec.interpolate_offset == 0
    antialias = spec.interpolate_antialias
    return plain and antialias == (spec.registers > 0), plain and antialias


def agreement(spec: BackboneSpec) -> str:
    """One sentence: at which sizes dinov2, Hugging Face and timm give the same features."""
    huggingface, timm = same_sizes(spec)
    if reason := without_huggingface(spec):
        where = "every size" if timm else f"{spec.image_size} x {spec.image_size} only"
        return f"{reason}; timm gives the same features at {where}."
    if huggingface and timm:
        return "dinov2, Hugging Face and timm give the same features at every size."
    native = f"{spec.image_size} x {spec.image_size}"
    if spec.interpolate_offset:
        why = f"neither resizes position embeddings with an offset of {spec.interpolate_offset:g}"
        return f"Hugging Face and timm give the same features at {native} only: {why}."
    if huggingface:
        return (
            f"Hugging Face gives the same features at every size, timm at {native} only: it "
            "antialiases resized position embeddings."
        )
    if timm:
        return (
            f"timm gives the same features at every size, Hugging Face at {native} only: without "
            "registers it does not antialias resized position embeddings."
        )
    return (
        f"Hugging Face and timm give the same features at {native} only: they antialias resized "
        "position embeddings, this model does not."
    )


def without_huggingface(spec: BackboneSpec) -> str:
    """Why Hugging Face has no model for this backbone; empty where it has one."""
    if spec.mlp_ratio == int(spec.mlp_ratio):
        return ""
    return f"Hugging Face takes whole numbers as mlp_ratio only, not {spec.mlp_ratio:g}"
