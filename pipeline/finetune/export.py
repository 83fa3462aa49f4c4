"""A fine-tuned classifier on disk, as other libraries load it, each checked by loading it back.

A ViT of ours becomes a folder for `AutoModelForImageClassification.from_pretrained`, a timm model
one for `timm.create_model("local-dir:<folder>", pretrained=True)`; an encoder of one's own one that
`jobs/embed.py model=<folder>` loads. Beside the weights is
`classes.txt`, a class name a line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.finetune.classifier import Classifier, spec_of
from pipeline.finetune.settings import Settings
from pipeline.images.preprocessing import Preprocessing
from pipeline.images.value_range import ValueRange
from pipeline.model.encoders.module import ModuleBackbone
from pipeline.model.foreign import TimmBackbone
from pipeline.model.foreign_weights import (
    CLASSIFIER,
    OURS,
    ClassHead,
    load_foreign,
    read_safetensors,
    save_module,
)
from pipeline.model.formats import (
    CONFIG,
    huggingface_config,
    preprocessor_config,
    timm_transform,
    without_huggingface,
)
from pipeline.model.names import to_huggingface
from pipeline.model.vit import VisionTransformer
from pipeline.model.weights import PREPROCESSOR, TOLERANCE, write_folder
from pipeline.storage.run_folder import atomic

CLASSES = "classes.txt"
MODELS = {
    "dinov2": "Dinov2ForImageClassification",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
}


def form_of(classifier: Classifier) -> str:
    """`huggingface`, `timm` or `module`: in which form a classifier can be exported.

    Raises:
        PipelineError: in neither.
    """
    if isinstance(classifier.backbone, VisionTransformer):
        if reason := without_huggingface(spec_of(classifier.backbone)):
            raise PipelineError(
                f"the classifier could not be exported: {reason}",
                "fine-tune a backbone with a whole model.mlp_ratio",
            )
        return "huggingface"
    if isinstance(own := classifier.backbone, ModuleBackbone):
        names = {f"{CLASSIFIER}.{name}" for name in classifier.head.state_dict()}
        if taken := sorted(names & own.module.state_dict().keys()):
            raise PipelineError(
                f"the classifier could not be exported: the encoder has tensors called "
                f"{', '.join(taken)} itself",
                "give that layer of the encoder another name than classifier",
            )
        return "module"
    _timm_classifier(classifier)
    return "timm"


def export(
    classifier: Classifier,
    class_names: tuple[str, ...],
    settings: Settings,
    value_range: ValueRange,
    folder: Path,
) -> str:
    """Writes a merged classifier (`merge_low_rank`) and loads it back; says how they compare.

    Args:
        classifier: on the CPU, in evaluation mode.
        class_names: by the number of the class.
        settings: of the fine-tuning.
        value_range: of images of more than 8 bits, that becomes 0 to 255.
        folder: where to; made if it is not there.

    Raises:
        PipelineError: what was written is not what is in memory.
    """
    saves = {"huggingface": save_huggingface, "timm": save_timm, "module": save_own}
    save = saves[form_of(classifier)]
    load = save(classifier, class_names, settings, value_range, folder)
    with atomic(folder / CLASSES) as partial:
        partial.write_text("".join(f"{name}\n" for name in class_names))
    return _compared(classifier, settings, folder, load)


def _images(settings: Settings, value_range: ValueRange) -> Preprocessing:
    return Preprocessing(settings.image_size, settings.mean, settings.std, value_range)


Load = Callable[[], tuple[str, Callable[[Tensor], Tensor]]]


def save_huggingface(
    classifier: Classifier,
    class_names: tuple[str, ...],
    settings: Settings,
    value_range: ValueRange,
    folder: Path,
) -> Load:
    """Writes config, weights and image processor; gives what loads them. Arguments as `export`."""
    backbone = classifier.backbone
    assert isinstance(backbone, VisionTransformer)
    spec = spec_of(backbone)
    config = huggingface_config(spec)
    kind = config["model_type"]
    config |= {
        "architectures": [MODELS[kind]],
        "id2label": {str(number): name for number, name in enumerate(class_names)},
        "label2id": {name: number for number, name in enumerate(class_names)},
        "problem_type": "single_label_classification",
    }
    tensors = {f"{kind}.{n}": x for n, x in to_huggingface(_on_cpu(backbone)).items()}
    tensors |= {f"classifier.{n}": x for n, x in _on_cpu(classifier.head).items()}
    configs = {PREPROCESSOR: preprocessor_config(_images(settings, value_range)), CONFIG: config}
    write_folder(folder, tensors, configs)

    def load() -> tuple[str, Callable[[Tensor], Tensor]]:
        transformers: Any = import_module("transformers")
        logging = transformers.utils.logging
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            auto = transformers.AutoModelForImageClassification
            model = auto.from_pretrained(str(folder), local_files_only=True).eval()
        finally:
            if bars:
                logging.enable_progress_bar()
        version = f"transformers {transformers.__version__}"
        return version, lambda x: model(pixel_values=x).logits

    return load


def save_timm(
    classifier: Classifier,
    class_names: tuple[str, ...],
    settings: Settings,
    value_range: ValueRange,
    folder: Path,
) -> Load:
    """As `save_huggingface`, for a timm model with its own classifier in the head's place."""
    backbone = classifier.backbone
    assert isinstance(backbone, TimmBackbone)
    place, _ = _timm_classifier(classifier)
    tensors = _on_cpu(backbone.module)
    tensors |= {f"{place}.{n}": x for n, x in _on_cpu(classifier.head).items()}
    classes = len(class_names)
    config = {
        "architecture": backbone.spec.name,
        "num_classes": classes,
        "num_features": backbone.width,
        "label_names": list(class_names),
        "model_args": {**backbone.arguments, "num_classes": classes},
        "pretrained_cfg": {
            **timm_transform(_images(settings, value_range)),
            "num_classes": classes,
            "classifier": place,
        },
        OURS: asdict(backbone.spec),  # by which the backbone comes in again
    }
    write_folder(folder, tensors, {CONFIG: config})

    def load() -> tuple[str, Callable[[Tensor], Tensor]]:
        timm: Any = import_module("timm")
        model = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
        return f"timm {timm.__version__}", model

    return load


def save_own(
    classifier: Classifier,
    class_names: tuple[str, ...],
    settings: Settings,
    value_range: ValueRange,
    folder: Path,
) -> Load:
    """As `save_huggingface`, for an encoder of one's own, which no library but this one loads."""
    backbone = classifier.backbone
    assert isinstance(backbone, ModuleBackbone)
    head = ClassHead(classifier.head.state_dict(), class_names)
    save_module(backbone, folder, _images(settings, value_range), head)

    def load() -> tuple[str, Callable[[Tensor], Tensor]]:
        again = load_foreign(folder)
        tensors = read_safetensors(folder)
        weight, bias = (tensors[f"{CLASSIFIER}.{name}"] for name in ("weight", "bias"))
        return "raydino", lambda x: again(x) @ weight.T + bias

    return load


def _timm_classifier(classifier: Classifier) -> tuple[str, nn.Linear]:
    """Where a timm model has its own classifier, which must be a linear layer as our head is.

    Raises:
        PipelineError: it has another one.
    """
    timm: Any = import_module("timm")
    backbone = classifier.backbone
    assert isinstance(backbone, TimmBackbone)
    name = backbone.spec.name
    if name.startswith("local-dir:"):
        raise PipelineError(
            f"timm:{name} is a folder, whose architecture an export cannot name",
            "give the weights' run or its exported folder without timm:, or a timm model by name",
        )
    head = classifier.head
    arguments = {**backbone.arguments, "num_classes": head.out_features}
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **arguments)
    for place, module in model.named_modules():
        if module is model.get_classifier():
            if isinstance(module, nn.Linear) and module.weight.shape == head.weight.shape:
                return place, module
            break
    raise PipelineError(
        f"timm:{name} has a classifier that is no linear layer on its features, so ours could not "
        "be exported",
        "choose another timm model, or a backbone of ours",
    )


def _on_cpu(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().cpu() for name, x in module.state_dict().items()}


@torch.no_grad()
def _compared(classifier: Classifier, settings: Settings, folder: Path, load: Load) -> str:
    """Compares logits with those of the library that loads the folder, where it is installed."""
    try:
        version, outputs = load()
    except ImportError as error:
        return f"not compared ({error})"
    side, channels = settings.image_size, len(settings.mean)
    pixels = torch.linspace(-2, 2, 2 * channels * side * side).view(2, channels, side, side)
    here, there = classifier(pixels), outputs(pixels)
    difference = (here - there).abs().max().item() if here.shape == there.shape else torch.inf
    if not difference <= TOLERANCE * max(1.0, here.abs().max().item()):
        raise PipelineError(
            f"{folder} gives other logits in {version}: they differ by {difference:.2g}",
            "report it with the versions of torch and of this library",
        )
    return f"equal in {version} but for {difference:.1g}" if difference else f"equal in {version}"
