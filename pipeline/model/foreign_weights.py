"""Weights of encoders that are not ours: into one, and a folder that timm loads by itself."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.encoders.module import ModuleBackbone, ModuleSpec
from pipeline.model.encoders.source import CODE, PREFIX, Name, from_copy, read_kept
from pipeline.model.fit import fold
from pipeline.model.foreign import ForeignBackbone, TimmBackbone, TimmSpec
from pipeline.model.formats import CONFIG, WEIGHTS, timm_transform
from pipeline.model.pair import Backbone, Spec
from pipeline.model.read import read_json, spec_from
from pipeline.model.weights import load_backbone, write_folder
from pipeline.storage.run_folder import atomic

NAMED = 3  # tensors of a kind that do not fit, in a sentence
CLASSIFIER = "classifier"  # before the names of a classifier's tensors
OURS = "raydino_spec"  # key of config.json under which our own settings stand; timm ignores it


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of `model.safetensors` in a folder.

    Raises:
        PipelineError: there is none.
    """
    file = Path(path)
    file = file / "model.safetensors" if file.is_dir() else file
    if file.suffix != ".safetensors" or not file.is_file():
        raise PipelineError(
            f"no safetensors file at {path}",
            "foreign encoders start from a .safetensors file (or its folder) or a run folder",
        )
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise PipelineError(
            f"{file} is no whole safetensors file: {error}", "copy or export it again"
        ) from error


def fit_foreign(
    backbone: ForeignBackbone, state: Mapping[str, Tensor], source: str, resize: bool = False
) -> str:
    """Load the encoder's own names (`module.*` as we save them, or bare) strictly; say what was
    left out: a classifier, which these models are built without.

    Args:
        backbone: the encoder.
        state: tensors by name.
        source: where they are from, for the message.
        resize: give position embeddings of timm models this encoder's grid (timm's own way).

    Raises:
        PipelineError: with some of the missing and unexpected names and of the other shapes, and
            their numbers.
    """
    expected = backbone.state_dict()
    tensors = {k if k in expected else f"module.{k}": v for k, v in state.items()}
    head = {
        k for k in tensors if k.startswith(("module.head.", "module.fc.", "module.classifier."))
    }
    left_out = sorted(head - set(expected))
    tensors = {k: v for k, v in tensors.items() if k not in left_out}
    if "mask_token" in expected and "mask_token" not in tensors:
        tensors["mask_token"] = expected["mask_token"]  # only training with masks has one
    position, own_position = (x.get("module.pos_embed") for x in (tensors, expected))
    grid = (
        position is not None and own_position is not None and position.shape != own_position.shape
    )
    if grid and resize and isinstance(backbone, TimmBackbone):
        tensors["module.pos_embed"] = backbone.resized_position(tensors["module.pos_embed"])
        grid = False
    missing = [k for k in expected if k not in tensors]
    unexpected = [k for k in tensors if k not in expected]
    others = [k for k, v in tensors.items() if k in expected and v.shape != expected[k].shape]
    problems = [
        _some("missing", len(missing), fold(_bare(missing))),
        _some("unexpected", len(unexpected), fold(_bare(unexpected))),
        _some("of another shape", len(others), [_shapes(k, tensors, expected) for k in others]),
    ]
    if missing or unexpected or others:
        hint = "name the model that these weights are of in model.encoder"
        if grid and not missing and not unexpected and len(others) == 1:
            hint = "model.init_resize=true resizes position embeddings"
        elif others and isinstance(backbone, ModuleBackbone):
            hint += ", and in augment.global_size, model.patch_size and model.in_channels the sizes"
            hint += " that they were trained with"
        raise PipelineError(
            f"{source} does not fit the encoder: {'; '.join(filter(None, problems))}", hint
        )
    backbone.load_state_dict(tensors)
    return f"{len(tensors)} tensors, {len(left_out)} of a classifier left out"


def _some(kind: str, count: int, named: Sequence[str]) -> str:
    """What is wrong with tensors, some of them by name; "" where there are none.

    Args:
        kind: of what is wrong.
        count: of the tensors.
        named: all of them, those of many blocks as one.
    """
    if len(named) <= NAMED:
        return f"{kind} {', '.join(named)}" if named else ""
    return f"{count:,} {kind}, such as {', '.join(named[:NAMED])}"


def _bare(names: Sequence[str]) -> list[str]:
    """Names as the library has them."""
    return [name.removeprefix("module.") for name in names]


def _shapes(name: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    theirs, ours = (tuple(one[name].shape) for one in (tensors, expected))
    return f"{name.removeprefix('module.')}: {theirs}, expected {ours}"


def save_foreign(
    backbone: TimmBackbone,
    folder: str | Path,
    images: Preprocessing,
) -> Path:
    """Write `model.safetensors` under timm's own names and `config.json`; each file appears whole
    or not at all. `timm.create_model("local-dir:<folder>", pretrained=True)` loads it.

    The mask token is of use in training only and is left out. Arguments as `save_module`.
    """
    spec = backbone.spec
    config = {
        "architecture": spec.name,
        "num_classes": 0,
        "num_features": backbone.width,
        "model_args": dict(backbone.arguments),
        "pretrained_cfg": {
            **timm_transform(_sized(images, spec.image_size)),
            "num_classes": 0,
        },
        OURS: asdict(spec),
    }
    state = {name: x.detach().cpu() for name, x in backbone.module.state_dict().items()}
    return write_folder(folder, state, {CONFIG: config})


def _sized(images: Preprocessing, side: int) -> Preprocessing:
    """With that side where it is not said."""
    return images if images.image_size else replace(images, image_size=side)


@dataclass(frozen=True)
class ClassHead:
    """A linear classifier: its tensors, and the classes by their number."""

    tensors: Mapping[str, Tensor]
    class_names: Sequence[str]


def save_module(
    backbone: ModuleBackbone,
    folder: str | Path,
    images: Preprocessing,
    head: ClassHead | None = None,
) -> Path:
    """Write the encoder of a module: `encoder/` with its text, `model.safetensors` under its own
    names, and `config.json` with its factory, the keywords that it gets and what images it takes.

    Args:
        backbone: made by a factory.
        folder: where to.
        images: that it takes; their side is by default that of its factory, which gets the same
            keywords again whatever stands here.
        head: a classifier on its features, whose tensors get the names `classifier.*`.
    """
    spec = backbone.spec
    assert spec is not None  # of a run, always
    folder = Path(folder)
    shutil.rmtree(folder / CODE, ignore_errors=True)
    for name, text in spec.files.items():
        with atomic(folder / CODE / name) as partial:
            partial.write_text(text, encoding="utf-8")
    sizes = {field.name: getattr(spec, field.name) for field in fields(TimmSpec)}
    config = {
        "factory": spec.name,
        "keywords": spec.taken(),
        "num_features": backbone.width,
        "code_digest": spec.digest,
        "pretrained_cfg": timm_transform(_sized(images, spec.image_size)),
        OURS: sizes | {"name": f"{PREFIX}{spec.name}"},
    }
    state = {name: x.detach().cpu() for name, x in backbone.module.state_dict().items()}
    if head is not None:
        config["label_names"] = list(head.class_names)
        state |= {f"{CLASSIFIER}.{name}": x.detach().cpu() for name, x in head.tensors.items()}
    return write_folder(folder, state, {CONFIG: config})


def _module_spec(sizes: TimmSpec, folder: Path) -> ModuleSpec:
    """What `save_module` wrote, with the text beside it.

    Raises:
        PipelineError: the text is not there, or this machine runs no such code.
    """
    place = folder / CODE
    files = read_kept(place)
    if not files:
        raise PipelineError(
            f"{folder} has no text of its encoder: there is nothing in {place}",
            "copy the folder again, with all that is in it",
        )
    name = sizes.name.removeprefix(PREFIX)
    from_copy(Name.of(name), files, str(place))
    return ModuleSpec(**asdict(sizes) | {"name": name, "files": files})


def load_foreign(folder: str | Path, random: bool = False) -> TimmBackbone | ModuleBackbone:
    """Read what `save_foreign` or `save_module` wrote; in eval mode, on the CPU.

    Args:
        folder: of the weights.
        random: the same network with random weights, from torch's global generator.

    Raises:
        PipelineError: it is not such a folder, or names or shapes do not fit.
    """
    folder = Path(folder)
    config = read_spec(folder)
    if config is None:
        raise PipelineError(
            f"{folder / CONFIG} is not the config of an encoder that we exported",
            "export the run again",
        )
    spec = spec_from(TimmSpec, config, folder / CONFIG)
    own = spec.name.startswith(PREFIX)
    backbone = _module_spec(spec, folder).build() if own else spec.build()
    if not random:
        fit_foreign(backbone, read_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return backbone.eval()


def load_any(
    folder: str | Path,
) -> tuple[Backbone, Spec]:
    """A backbone that an export wrote, ours or another encoder, and what it is made of.

    Raises:
        PipelineError: as `load_backbone` and `load_foreign`.
    """
    if read_spec(folder) is None:
        return load_backbone(folder)
    backbone = load_foreign(folder)
    assert backbone.spec is not None  # it was made from one
    return backbone, backbone.spec


def read_spec(folder: str | Path) -> dict[str, Any] | None:
    """Our settings in a folder that `save_foreign` or `save_module` wrote, None for any other."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return None
    spec = read_json(path).get(OURS)
    return spec if isinstance(spec, dict) else None


@torch.no_grad()
def verify_module(backbone: ModuleBackbone, folder: str | Path) -> str:
    """Load the folder and compare an output to the bit.

    Raises:
        PipelineError: what was written gives other features.
    """
    spec = backbone.spec
    assert spec is not None
    image = _ramp(spec)
    here, out = backbone.cpu().eval()(image), load_foreign(folder)(image)
    if not torch.equal(here, out):
        worst = float((here - out).abs().max())
        raise PipelineError(
            f"{folder} gives other features (up to {worst:.2g})",
            "does its forward draw random numbers in eval mode? if not, check the disk",
        )
    return "equal to the bit, read back"


def _ramp(spec: TimmSpec | ModuleSpec) -> Tensor:
    size = spec.image_size
    return torch.linspace(-2, 2, spec.in_channels * size * size).view(1, -1, size, size)


@torch.no_grad()
def verify_foreign(backbone: TimmBackbone, folder: str | Path) -> str:
    """Load the folder by ourselves and through timm, and compare an output to the bit.

    Raises:
        PipelineError: what was written gives other features.
    """
    import timm

    spec = backbone.spec
    image = _ramp(spec)
    was = backbone.training
    here = backbone.cpu().eval()(image)
    backbone.train(was)
    # The path in the name is not a registry's: timm reads the folder.
    theirs = timm.create_model(f"local-dir:{Path(folder).absolute()}", pretrained=True).eval()
    for who, out in (("raydino", load_foreign(folder)(image)), ("timm", theirs(image))):
        if not torch.equal(here, out):
            worst = float((here - out).abs().max())
            raise PipelineError(
                f"{folder} read by {who} gives other features (up to {worst:.2g})",
                "check the disk and export again",
            )
    return f"equal to the bit, read by raydino and timm {timm.__version__}"
