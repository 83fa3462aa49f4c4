"""The export stage: the teacher's backbone as weights that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.data import Augment
from pipeline.context import Context, result_line
from pipeline.heartbeat import now
from pipeline.images.value_range import FULL, ValueRange
from pipeline.model.foreign import TimmBackbone
from pipeline.model.foreign_weights import save_foreign, verify_foreign
from pipeline.model.formats import deep_key
from pipeline.model.vit import BackboneSpec, VisionTransformer
from pipeline.model.weights import (
    agreement,
    save_backbone,
    save_huggingface,
    save_timm,
    verify,
    verify_huggingface,
    verify_timm,
    without_huggingface,
)
from pipeline.stages.evaluate import chosen, teacher, trained_plan
from pipeline.storage.run_folder import fingerprint, write_json
from pipeline.track import ModelCard
from pipeline.train import build
from pipeline.uri import public
from pipeline.views.crops import evaluation_resize

FORMATS = ("dinov2", "huggingface", "timm")
FILES = ("model.safetensors", "config.json")


def key(context: Context) -> str:
    """Changes with the checkpoint, and with the formats that are written."""
    saved = chosen(context)
    return fingerprint([saved.step, saved.meta.get("plan"), FORMATS])


def intact(context: Context) -> bool:
    """Whether what a finished stage wrote is still there."""
    weights = context.folder.path / "weights"
    written = context.folder.last("export").get("formats", {})
    files = [weights / name / file for name in written for file in FILES]
    return bool(written) and all(file.is_file() for file in files)


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Writes `weights/{dinov2,huggingface,timm}`, each loaded back and compared before it says
    done.
    """
    saved = chosen(context)
    plan = trained_plan(saved)
    config, value_range = plan.config, plan.value_range or FULL
    backbone = teacher(saved).backbone.eval()
    weights = context.folder.path / "weights"
    if isinstance(backbone, TimmBackbone):
        mean, std = config.augment.mean, config.augment.std
        folder = save_foreign(backbone, weights / "timm", mean, std, value_range)
        formats, agreed = {"timm": verify_foreign(backbone, folder)}, ""
    elif isinstance(backbone, VisionTransformer):
        spec = build.backbone_spec(config)
        formats = _write(backbone, spec, weights, config.augment, value_range)
        agreed = agreement(spec)
        folder = weights / "dinov2"
    scores = context.results.get("evaluate", {}).get("trained", {})
    score = scores.get(f"eval/knn{context.config.evaluate.k}_top1")
    place = public(context.folder.at("weights"))
    text = f"{place} from step {saved.step}: {', '.join(formats)}, loaded back and equal"
    result_line("export", text)
    details = [f"* {name}: {said}" for name, said in formats.items()]
    tracker.note("\n\n".join([text, "\n".join(details), agreed]))
    tracker.artifact(folder / "config.json", "weights")
    now("export: logging the model")
    card = ModelCard(
        name=context.config.track.model_name,
        score=score,
        note=text,
        image_size=config.augment.global_size,
        mean=config.augment.mean,
        std=config.augment.std,
        value_range=value_range,
    )
    tracker.model(folder, card)
    size = sum((weights / name / "model.safetensors").stat().st_size for name in formats)
    return {
        "text": text,
        "folder": public(context.folder.at("weights", folder.name)),
        "formats": formats,
        "step": saved.step,
        "bytes": size,
        "knn": score,
    }


def _write(
    backbone: VisionTransformer,
    spec: BackboneSpec,
    weights: Path,
    augment: Augment,
    value_range: ValueRange,
) -> dict[str, str]:
    """Writes and checks every format; gives what each was compared with."""
    size = augment.global_size
    pixels = augment.mean, augment.std, size, value_range
    done = {}
    now("export: dinov2, written and read back")
    folder = save_backbone(backbone, spec, weights / "dinov2")
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_mean": augment.mean,
            "image_std": augment.std,
            "crop_size": size,
            "resize": evaluation_resize(size),  # both sides, whatever the image's, bicubic
            **deep_key(value_range),
        },
    )
    verify(backbone, folder)
    done["dinov2"] = "equal to the bit, read back"
    if not without_huggingface(spec):
        now("export: huggingface, written and compared")
        folder = save_huggingface(backbone, spec, weights / "huggingface", *pixels)
        done["huggingface"] = verify_huggingface(backbone, spec, folder)
    now("export: timm, written and compared")
    folder = save_timm(backbone, spec, weights / "timm", *pixels)
    done["timm"] = verify_timm(backbone, spec, folder)
    return done
