"""How each kind of model is read: a run's teacher, weights in any format, timm by name.

Functions of a module, so that a partial of one can be sent to a task.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.images.value_range import FULL, from_json
from pipeline.storage.places import list_files, resolve_uri
from pipeline.uri import is_uri, join, public

log = logging.getLogger("pipeline.embed")

TIMM = "timm:"
# what an export leaves of a ViT of ours, of a timm encoder, of a module of one's own, and a
# fine-tuning of a ViT of ours
EXPORTS = ("dinov2", "timm", "huggingface", "module")
LOCAL_DIR = "local-dir:"  # timm's word for a folder
Stamps = tuple[tuple[Path, int, int], ...]  # files, their bytes, when they were written
_BLOCK = 2**24
_NAMED = 8  # models that are at hand, in a sentence


# ---- Where it is, and whether it is the same as before.


def weights_at(path: str) -> str:
    """The file or folder of the weights: in a run folder or the folder of an export, those that an
    export wrote there, else those of a classifier that was fine-tuned.
    """
    for folder in (Path(path), Path(path, "weights"), Path(path, "finetune")):
        if (folder / "config.json").is_file():
            break
        for name in EXPORTS:
            if (folder / name / "config.json").is_file():
                return str(folder / name)
    return path


def digest_of(path: str | Path) -> str:
    """Of a file's content, or of all files in a folder and their names.

    Raises:
        PipelineError: there is none.
    """
    if is_uri(path):
        raise PipelineError(
            f"no embedder: {public(path)} holds no checkpoint of ours",
            "at a URI, name a run folder or a .onnx file; download other weights",
        )
    place = Path(path)
    if not place.exists():
        raise PipelineError(
            f"no embedder: there is no {path}",
            "give descriptor, a run folder, weights as for model.init, timm:<name> or a .onnx file",
        )
    return _hashed(place, stamps_of(place))


def stamps_of(place: Path) -> Stamps:
    """Size and time of a file, or of all files in a folder: what is remembered of weights is
    remembered under them, for a file may be written anew.
    """
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    known = [(file, file.stat()) for file in files if file.exists()]
    return tuple((file, facts.st_size, facts.st_mtime_ns) for file, facts in known)


@lru_cache(8)  # a stage asks for its key several times
def _hashed(place: Path, files: Stamps) -> str:
    hashed = blake2b(digest_size=8)
    for file, _, _ in files:
        hashed.update(f"{file.relative_to(place)}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                hashed.update(block)
    return hashed.hexdigest()


def at_hand(folder: str) -> str:
    """The runs in a folder that have a checkpoint or exported weights, as a sentence may list them;
    empty where there is none.
    """
    fs, path = resolve_uri(folder)
    names = [info.base_name for info in list_files(fs, path, recursive=False, folders=True)]
    runs = [name for name in sorted(names) if _has_model(str(join(folder, name)))]
    more = [f"and {len(runs) - _NAMED} more"] if len(runs) > _NAMED else []
    return ", ".join([public(join(folder, name)) for name in runs[:_NAMED]] + more)


def _has_model(run: str) -> bool:
    fs, path = resolve_uri(run)
    steps = list_files(fs, f"{path}/checkpoints", recursive=False, folders=True)
    if any(info.base_name.startswith("step-") for info in steps):
        return True
    return not is_uri(run) and weights_at(run) != run


# ---- Weights.


def load_weights(path: str, random: bool = False) -> Any:
    """The backbone in a file or folder that `model.init` takes, or a timm encoder that we exported;
    its sizes are read off the weights, and it resizes position embeddings as their own model does.

    Args:
        path: of the weights.
        random: the same network with random weights, from torch's global generator.

    Raises:
        PipelineError: no weights, or not those of a DINOv2 backbone.
    """
    import torch

    from pipeline.model.fit import Facts, fit
    from pipeline.model.foreign_weights import load_foreign, read_spec
    from pipeline.model.read import resizing_of
    from pipeline.model.vit import BackboneSpec
    from pipeline.model.weights import read_weights

    if Path(path).is_dir() and read_spec(path) is not None:
        return load_foreign(path, random)
    weights = read_weights(path)
    facts = Facts.of(weights.state)
    if not facts.width or not facts.depth or not facts.patch_size:
        raise PipelineError(
            f"{path} ({weights.origin}) holds no vision transformer", "see model.init"
        )
    spec = BackboneSpec(
        image_size=max(1, math.isqrt(facts.patches)) * facts.patch_size,
        patch_size=facts.patch_size,
        width=facts.width,
        depth=facts.depth,
        heads=weights.heads or max(1, facts.width // 64),  # 64 wide in every ViT of DINOv2
        mlp_ratio=facts.mlp_ratio,
        ffn=facts.ffn,
        registers=facts.registers,
        in_channels=facts.in_channels,
        **asdict(resizing_of(path, weights)),
    )
    if random:
        return spec.build().eval()
    with torch.device("meta"):
        backbone = spec.build().eval()
    fit(backbone, weights, path)
    return backbone


def preprocessing_of(path: str) -> Preprocessing:
    """What is written beside weights, in the files of the three formats, on the images they take.

    Raises:
        PipelineError: such a file holds something else.
    """
    from pipeline.model.read import read_json

    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not Path(path).is_dir() and Path(path).name != "model.safetensors":
        return Preprocessing()  # a loose file, which need not belong to what lies beside it
    values: Mapping[str, Any] = {}
    if (file := folder / "preprocessor_config.json").is_file():
        values = read_json(file)
        size = values.get("crop_size") or values.get("size")
        size = size.get("height") or size.get("shortest_edge") if isinstance(size, dict) else size
        names = ("image_mean", "image_std")
        asked = values.get("size")
        if isinstance(asked, dict) and asked.get("shortest_edge"):
            _say_other_shape(str(file))
    elif (file := folder / "config.json").is_file():
        values = read_json(file).get("pretrained_cfg") or {}
        size = (values.get("input_size") or [None])[-1]
        names = ("mean", "std")
        if values and values.get("crop_mode", "center") != "squash":
            _say_other_shape(str(file))
    if not values:
        return Preprocessing()
    mean, std = (values.get(name) or () for name in names)
    try:
        numbers = tuple(map(float, mean)), tuple(map(float, std))
        known = Preprocessing(
            size and int(size), *numbers, from_json(values.get("value_range")) or FULL
        )
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{file} has {', '.join(names)} that are no lists of numbers: {mean!r}, {std!r}",
            "put the file back, or export the run again",
        ) from error
    return known


def preprocessing_beside(path: str) -> Preprocessing:
    """As `preprocessing_of`; beside weights that we exported in DINOv2's form nothing is written,
    and the other forms of the same export say it.

    Raises:
        PipelineError: as `preprocessing_of`.
    """
    place = Path(path)
    if not place.exists():
        return Preprocessing()
    known = preprocessing_of(path)
    if known.mean or place.name != EXPORTS[0]:
        return known
    others = [place.parent / name for name in EXPORTS[1:]]
    said = [preprocessing_of(str(one)) for one in others if one.is_dir()]
    return next((one for one in said if one.mean), known)


@lru_cache
def _say_other_shape(file: str) -> None:
    """Says once that images of other shapes are prepared otherwise than by the file beside them."""
    log.warning(
        "%s keeps the shape of an image and cuts its sides off; here the whole image becomes a "
        "square first, as in an evaluation: vectors of images that are not square differ from "
        "those of that library",
        public(file),
    )


# ---- A run of ours.


def load_teacher(checkpoint: str) -> Any:
    """In a task: the teacher's backbone of a checkpoint.

    Raises:
        DataError: it is gone.
    """
    from pipeline.train.checkpoint import state
    from pipeline.train.start import encoder_of

    saved = state.at(checkpoint if is_uri(checkpoint) else Path(checkpoint))
    if saved is None:
        raise DataError(f"the checkpoint {public(checkpoint)} is gone", "run the same again")
    return encoder_of(saved)[0].backbone.eval()


# ---- What a name means: how to load it, its digest, and the images it takes.

Known = tuple[Callable[[], Any], str, Preprocessing]


def known_run(model: str) -> Known | None:
    """The teacher of a run's chosen checkpoint; None where there is none."""
    from pipeline.plan.plan import evaluation_size
    from pipeline.plan.resume import plan_of
    from pipeline.train.checkpoint import state
    from pipeline.train.encoders.kept import say_copy
    from pipeline.train.start import checkpoint_at

    saved = None if Path(model).is_file() else checkpoint_at(model)
    if saved is None:
        return None
    plan = plan_of(saved.meta, saved.path)
    say_copy(plan, saved)
    augment = plan.config.augment
    side = evaluation_size(plan.config)
    known = Preprocessing(side, augment.mean, augment.std, plan.value_range or FULL)
    return partial(load_teacher, str(saved.path)), state.identity(saved), known


def known_weights(model: str, folder: str) -> Known:
    """Weights in a file or folder.

    Raises:
        PipelineError: there are none; says which runs of a folder are at hand.
    """
    path = weights_at(model)
    if Path(path, "config.yaml").is_file() and not Path(path, "config.json").is_file():
        near = at_hand(folder)
        raise PipelineError(
            f"no embedder: {public(path)} is a run folder without a checkpoint or weights",
            "pretrain it first" + f"; at hand are {near}" * bool(near),
        )
    if Path(path).is_dir() and not Path(path, "config.json").is_file():  # before it is hashed whole
        raise PipelineError(
            f"no embedder: {public(path)} is a folder without a config.json, which the weights of "
            "all three formats have",
            "name the folder of the weights or their file, not one of images",
        )
    known = preprocessing_of(path)
    _say_code(path)
    return partial(load_weights, path), digest_of(path), known


def _say_code(path: str) -> None:
    """Says here, not in tasks, that weights of an encoder of one's own come with its text.

    Raises:
        PipelineError: this machine runs no such code.
    """
    from pipeline.model.encoders.source import CODE, PREFIX, Name, from_copy, read_kept
    from pipeline.model.read import read_json

    config = Path(path, "config.json")
    factory = read_json(config).get("factory") if config.is_file() else None
    if isinstance(factory, str):
        place = Path(path, CODE)
        from_copy(Name.of(f"{PREFIX}{factory}"), read_kept(place), str(place))


# ---- timm.


def load_timm(name: str, random: bool = False) -> Any:
    """A timm model with its own weights, which timm fetches where this machine has them not.

    Args:
        name: without `timm:`; also `local-dir:<folder>`.
        random: without these weights, as timm draws them from torch's global generator.

    Raises:
        PipelineError: timm is missing, has no such model, or cannot get its weights.
    """
    from pipeline.model.foreign import timm_by_name

    return timm_by_name(name, pretrained=not random).eval()


def timm_facts(name: str) -> tuple[str, Preprocessing]:
    """Digest of a timm model's weights, and the images they take.

    Raises:
        PipelineError: as `load_timm`.
    """
    folder = name.removeprefix(LOCAL_DIR) if name.startswith(LOCAL_DIR) else ""
    return _timm_facts(name, stamps_of(Path(folder)) if folder else ())


@lru_cache(4)
def _timm_facts(name: str, files: Stamps) -> tuple[str, Preprocessing]:
    from pipeline.model.weights import tensors_digest

    backbone = load_timm(name)
    config: Any = backbone.module.pretrained_cfg
    known = Preprocessing(config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]))
    return tensors_digest(backbone.module), known
