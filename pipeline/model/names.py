"""One backbone under four sets of names: ours (dinov2's), a training checkpoint's, Hugging Face's,
timm's.

Every function takes and gives a state dict and knows nothing of files. D width, P patches, R
registers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

# Hugging Face's names as the files on its hub have them. transformers 5 calls its modules otherwise
# (q_proj, gate_proj ...) and renames when it loads and saves.
_HUB = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HUB_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
_OURS = {hub: name for name, hub in _HUB.items()}
_OURS_BLOCK = {hub: name for name, hub in _HUB_BLOCK.items()}
_BLOCK = re.compile(r"(?:encoder\.layer|blocks)\.(\d+)\.(.+)")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def flatten_chunks(state: Mapping[str, Tensor]) -> State:
    """Rename `blocks.<chunk>.<i>.*` to `blocks.<i>.*`; other names stay."""
    flat = {}
    for name, x in state.items():
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) > 2 and parts[2].isdigit():
            del parts[1]
        flat[".".join(parts)] = x
    return flat


def from_checkpoint(checkpoint: Mapping[str, Any]) -> tuple[State, str]:
    """The backbone in a loaded dinov2 `.pth` file, and a sentence on what was left out.

    A raw state dict, or one under `teacher`, `model`, `state_dict` or `student` (the first that is
    there). In it, `teacher.` goes before `student.`, only `backbone.*` is taken where there is any,
    wrappers of DDP, FSDP and compile are dropped from the names, and block chunks are flattened.
    """
    for key in ("teacher", "model", "state_dict", "student"):
        if isinstance(inner := checkpoint.get(key), Mapping):
            checkpoint = inner
            break
    left: Counter[str] = Counter()
    state: State = {}
    for name, x in checkpoint.items():
        if isinstance(x, Tensor):
            state[_unwrapped(name)] = x
        else:
            left[name] += 1
    for prefix in ("teacher.", "student.", "backbone."):
        if any(name.startswith(prefix) for name in state):
            others = [name for name in state if not name.startswith(prefix)]
            left.update(name.partition(".")[0] for name in others)
            inside = [name for name in state if name.startswith(prefix)]
            state = {name.removeprefix(prefix): state[name] for name in inside}
    return flatten_chunks(state), _left_out(left)


def to_huggingface(state: Mapping[str, Tensor]) -> State:
    """Hub names of `Dinov2Model` and `Dinov2WithRegistersModel`; qkv is cut into three."""
    out: State = {}
    for name, x in state.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            out[_renamed(name, _HUB)] = x
            continue
        number, within = block.groups()
        prefix = f"encoder.layer.{number}."
        if within.startswith("attn.qkv."):
            kind = within.rpartition(".")[2]
            for part, third in zip(_QKV, x.chunk(3), strict=True):
                out[f"{prefix}{part}.{kind}"] = third
        else:
            out[prefix + _renamed(within, _HUB_BLOCK)] = x
    return out


def from_huggingface(state: Mapping[str, Tensor]) -> tuple[State, str]:
    """Our names of hub names, and a sentence on what was left out or made up.

    A model with a head has its backbone behind `dinov2.` or `dinov2_with_registers.`. Unknown names
    stay as they are, for the one who loads them to refuse.
    """
    left: Counter[str] = Counter()
    for prefix in ("dinov2.", "dinov2_with_registers."):
        if any(name.startswith(prefix) for name in state):
            left.update(n.partition(".")[0] for n in state if not n.startswith(prefix))
            state = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
    out: State = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, x in state.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            out[_renamed(name, _OURS)] = x
            continue
        number, within = block.groups()
        part, _, kind = within.rpartition(".")
        if part in _QKV:
            thirds.setdefault(f"blocks.{number}.attn.qkv.{kind}", {})[part] = x
        else:
            out[f"blocks.{number}.{_renamed(within, _OURS_BLOCK)}"] = x
    for name, parts in thirds.items():
        if len(parts) == 3:
            out[name] = torch.cat([parts[part] for part in _QKV])
        else:  # incomplete: shown under the names the file has
            head, kind = name.split("attn.qkv.")
            out.update({f"{head}{part}.{kind}": x for part, x in parts.items()})
    return out, " ".join(filter(None, [_left_out(left), _with_mask_token(out)]))


def to_timm(state: Mapping[str, Tensor]) -> State:
    """Names of timm, as its `vit_*_patch14_dinov2` and `vit_*_patch14_reg4_dinov2` have them.

    There is no mask token. With registers the CLS token comes with its position added and the
    position embedding has no CLS row (timm: `no_embed_class`).
    """
    out = dict(state)
    out.pop("mask_token", None)
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
        position = out["pos_embed"]
        out["cls_token"] = out["cls_token"] + position[:, :1]
        out["pos_embed"] = position[:, 1:]
    return {name.replace(".w12.", ".fc1.").replace(".w3.", ".fc2."): x for name, x in out.items()}


def from_timm(state: Mapping[str, Tensor], no_embed_class: bool | None = None) -> tuple[State, str]:
    """Our names of timm's, and a sentence on what was left out or made up.

    Where timm holds CLS and its position as one sum, the sum becomes our CLS token and the CLS row
    of the position embedding is 0: the model only ever uses the sum, and how it was split is lost.

    Args:
        state: names of timm's `VisionTransformer`.
        no_embed_class: whether the position embedding has rows for patches only; None: by its
            length, which must leave a square of patches.
    """
    left = Counter(name.partition(".")[0] for name in state if name.startswith("head."))
    out = {name: x for name, x in state.items() if not name.startswith("head.")}
    for name in [n for n in out if n.endswith(".mlp.fc1.weight")]:
        prefix = name.removesuffix("fc1.weight")
        second = out.get(f"{prefix}fc2.weight")
        # fc1 of a packed gate gives gate and value, in dinov2's order, of which fc2 takes one.
        if second is not None and len(out[name]) == 2 * second.shape[-1]:
            for kind in ("weight", "bias"):
                for theirs, ours in (("fc1", "w12"), ("fc2", "w3")):
                    if f"{prefix}{theirs}.{kind}" in out:
                        out[f"{prefix}{ours}.{kind}"] = out.pop(f"{prefix}{theirs}.{kind}")
    if "reg_token" in out:
        out["register_tokens"] = out.pop("reg_token")
    note = [_left_out(left), _with_mask_token(out)]
    position, cls = out.get("pos_embed"), out.get("cls_token")
    if position is not None and cls is not None and position.ndim == 3:
        registers = out["register_tokens"].shape[1] if "register_tokens" in out else 0
        if no_embed_class is None:
            no_embed_class = math.isqrt(position.shape[1]) ** 2 == position.shape[1]
        if no_embed_class:
            out["pos_embed"] = torch.cat([torch.zeros_like(cls), position], dim=1)
            note.append("The CLS token holds its position, whose own row is 0.")
        elif registers:
            rows = position[:, 1 : 1 + registers]
            out["register_tokens"] = out["register_tokens"] + rows
            out["pos_embed"] = torch.cat([position[:, :1], position[:, 1 + registers :]], dim=1)
            note.append("The registers hold their positions.")
    return out, " ".join(filter(None, note))


def _unwrapped(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """The longest left part of a name that the table has, replaced."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (renamed := table.get(".".join(parts[:length]))) is not None:
            return ".".join([renamed, *parts[length:]])
    return name


def _with_mask_token(state: State) -> str:
    """Adds the mask token that a file without one lacks: 0, as it is before any training."""
    if "mask_token" in state or "cls_token" not in state:
        return ""
    state["mask_token"] = torch.zeros_like(state["cls_token"][0])
    return "It has no mask token; a fresh one (0) is used."


def _left_out(names: Iterable[str] | Counter[str]) -> str:
    counted = Counter(names)
    listed = ", ".join(f"{name} ({count})" for name, count in counted.items())
    return f"Left out: {listed}." if counted else ""
