"""What weights say of themselves: the network, the images that they take, whether heads come along.

`facts_of` opens what `model.init` names, as training will, and gives fields of the config.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.adapt.networks import (
    OURS,
    PREFIX,
    Facts,
    depth_of,
    knows_layers,
    of_own_module,
    of_timm,
    of_vit,
    parameters_of,
    patches_of,
)
from pipeline.config.config import Config
from pipeline.embed.load import (
    EXPORTS,
    LOCAL_DIR,
    TIMM,
    Stamps,
    preprocessing_beside,
    stamps_of,
    timm_facts,
    weights_at,
)
from pipeline.errors import ConfigError, PipelineError
from pipeline.images.value_range import FULL
from pipeline.storage.places import absolute_uri
from pipeline.uri import is_uri, public

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
SAY_IMAGES = ("config.json", "preprocessor_config.json")  # beside weights
OF_A_STUDENT = ("model",)  # of features: there are no heads that the others belong to


def facts_of(config: Config) -> Facts:
    """The facts of the weights in `model.init`.

    Raises:
        PipelineError: no weights are named, nothing that can be read is there, or the recipe names
            an encoder that they do not fit.
    """
    init = config.model.init
    if not init:
        raise ConfigError(
            "no weights to adapt: model.init is empty",
            "name them: python jobs/adapt.py WEIGHTS PHOTOS/, where WEIGHTS is a file or folder of "
            "weights, timm:<name>, or a run",
        )
    encoder = config.model.encoder if "encoder" in config.model.model_fields_set else ""
    if init.startswith(TIMM) and LOCAL_DIR not in init:
        return _of_timm_itself(init, encoder, config)
    if init.startswith(TIMM):
        init = absolute_uri(init.removeprefix(TIMM).removeprefix(LOCAL_DIR))
    if identity := _checkpoint(init):
        return _of_run(init, identity)
    path = weights_at(init)
    if is_uri(path):
        raise PipelineError(
            f"model.init={public(path)} holds no checkpoint of ours",
            "at a URI, name a run folder or a folder checkpoints/step-…; download other weights",
        )
    if encoder.startswith(PREFIX) and not _exported_of(path, encoder):
        from pipeline.model.foreign_weights import read_safetensors

        return of_own_module(config, path, preprocessing_beside(path), read_safetensors(path))
    return _of_files(path, encoder, _stamps(path))


def _of_timm_itself(init: str, encoder: str, config: Config) -> Facts:
    """Weights that timm has, or says why not."""
    name = init.removeprefix(TIMM)
    digest, known = timm_facts(name)
    if encoder in ("", init):
        return _of_timm_alone(init, digest)
    if encoder == OURS:
        raise ConfigError(
            f"model.init={init} are weights of a timm model, and model.encoder={OURS} is a network "
            "of our own",
            f"leave model.encoder out, which then is {init}; or name a file or folder of weights",
        )
    from pipeline.model.foreign import timm_by_name

    state = timm_by_name(name, pretrained=True).state_dict()
    if encoder.startswith(PREFIX):
        return of_own_module(config, init, known, state)
    return of_timm(encoder, init, known, state)


@lru_cache(2)  # asked for by the start, the stage and its key
def _of_timm_alone(init: str, digest: str) -> Facts:
    return of_timm(init, init, timm_facts(init.removeprefix(TIMM))[1])


@lru_cache(2)
def _of_files(path: str, encoder: str, stamps: Stamps) -> Facts:
    """Weights in a file or folder, as long as it stays what it is."""
    from pipeline.model.foreign_weights import read_safetensors

    known = preprocessing_beside(path)
    if encoder.startswith(TIMM):
        return of_timm(encoder, path, known, read_safetensors(path))
    name = _architecture(path) if encoder != OURS else ""
    if not name:
        return of_vit(path, known)
    try:
        return of_vit(path, known)
    except PipelineError:  # another kind of network than ours
        return of_timm(f"{TIMM}{name}", path, known, read_safetensors(path))


def _stamps(path: str) -> Stamps:
    """Of weights, and of the files beside them and beside the other forms of the same export, which
    say what images they take.
    """
    place = Path(path)
    if place.is_dir() and not (place / "config.json").is_file():
        return ()  # a folder of anything, which is refused
    folders = [place.parent] * place.is_file()
    if place.name == EXPORTS[0]:
        folders = [place.parent / name for name in EXPORTS[1:]]
    beside = [folder / name for folder in folders for name in SAY_IMAGES]
    return (*stamps_of(place), *(stamp for file in beside for stamp in stamps_of(file)))


def _exported_of(path: str, encoder: str) -> bool:
    """Whether weights are an export of ours of that very encoder, which says its sizes."""
    from pipeline.model.foreign_weights import read_spec

    spec = read_spec(path) or {}
    return spec.get("name") == encoder


def _architecture(path: str) -> str:
    """The timm model that a folder says it is of; "" where it says none."""
    from pipeline.model.read import read_json

    file = Path(path) / "config.json"
    return str(read_json(file).get("architecture") or "") if file.is_file() else ""


def _checkpoint(init: str) -> str:
    """Identity of the checkpoint that a run folder or a path means; "" where it means none."""
    from pipeline.train.checkpoint import state
    from pipeline.train.start import checkpoint_at

    saved = None if Path(init).is_file() else checkpoint_at(init)
    return "" if saved is None else state.identity(saved)


@lru_cache(2)
def _of_run(init: str, identity: str) -> Facts:
    """The best checkpoint of a run of ours, heads included."""
    from pipeline.plan.resume import plan_of
    from pipeline.train.start import checkpoint_at, encoder_of

    saved = checkpoint_at(init)
    assert saved is not None
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
    if plan.value_range not in (None, FULL):  # which also stands for images of 8 bits
        values["data.range"] = list(plan.value_range)
    side = config.augment.global_size
    patches = patches_of(backbone)
    return Facts(
        init=init,
        what=f"a run of ours {'with its' if trained else 'without'} heads, step {saved.step:,}",
        values=values,
        image_size=side,
        own_grid=side if patches else None,
        patch_size=patches,
        width=backbone.width,
        depth=depth_of(backbone),
        has_layers=knows_layers(backbone),
        has_heads=trained,
        parameters=parameters_of(backbone),
        batch_norm=config.train.batch_norm == "kept",  # else its own means moved, and go on
    )
