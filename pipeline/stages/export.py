"""The export stage: the teacher's backbone as weights that other programs load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.context import Context, result_line
from pipeline.evaluate.teacher import Evaluator
from pipeline.heartbeat import now
from pipeline.images.preprocessing import Preprocessing
from pipeline.images.value_range import FULL
from pipeline.model.encoders.module import ModuleBackbone
from pipeline.model.foreign import ForeignBackbone, TimmBackbone
from pipeline.model.foreign_weights import (
    save_foreign,
    save_module,
    verify_foreign,
    verify_module,
)
from pipeline.model.formats import deep_key, known_size, same_sizes
from pipeline.model.onnx_out import OnnxFile, SessionModule, save_onnx
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
from pipeline.plan.plan import Plan, evaluation_size
from pipeline.stages.evaluation import chosen, teacher, trained_plan
from pipeline.stages.pretrain import params
from pipeline.stages.tracked import model_page
from pipeline.storage.run_folder import fingerprint, write_json
from pipeline.track import ModelCard
from pipeline.train import build
from pipeline.train.checkpoint.state import Saved, identity
from pipeline.train.evaluator import evaluation_spec
from pipeline.uri import public
from pipeline.views.crops import evaluation_resize

FORMATS = ("dinov2", "huggingface", "timm")
# of an encoder of one's own
ONLY_OURS = "not written: dinov2, huggingface and timm, which hold their own networks alone"
FILES = ("model.safetensors", "config.json")


def key(context: Context) -> str:
    """Changes with the checkpoint, with the formats that are written, and with the registered
    model that they become a version of.
    """
    saved, settings = chosen(context), context.config.export
    name = context.config.track.register or context.config.track.model_name
    asked = [["onnx", *settings.onnx_sizes]] * settings.onnx + [["register", name]] * bool(name)
    plan = trained_plan(saved)
    size = scored_size(context, plan)
    other = size != plan.config.augment.global_size  # told apart from what was written before
    return fingerprint([identity(saved), FORMATS, *asked] + [["size", size]] * other)


def intact(context: Context) -> bool:
    """Whether what a finished stage wrote is still there."""
    weights = context.folder.path / "weights"
    last = context.folder.last("export")
    written = last.get("formats", {})
    files = [weights / name / file for name in written for file in FILES]
    files += [weights / "onnx" / name for name in last.get("onnx", {})]
    return bool(written) and all(file.is_file() for file in files)


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Writes `weights/{dinov2,huggingface,timm}`, or `weights/timm` or `weights/module` of another
    encoder, and `onnx` where it is asked for, each loaded back and compared before it says done.
    """
    saved = chosen(context)
    plan = trained_plan(saved)
    config, value_range = plan.config, plan.value_range or FULL
    backbone = teacher(saved).backbone.eval()
    weights, images = context.folder.path / "weights", _images(context, plan)
    if isinstance(backbone, TimmBackbone):
        folder = save_foreign(backbone, weights / "timm", images)
        formats, agreed = {"timm": verify_foreign(backbone, folder)}, ""
    elif isinstance(backbone, ModuleBackbone):
        folder = save_module(backbone, weights / "module", images)
        formats, agreed = {"module": verify_module(backbone, folder)}, ONLY_OURS
    elif isinstance(backbone, VisionTransformer):
        spec = build.backbone_spec(config)
        formats = _write(backbone, spec, weights, images)
        agreed = agreement(spec)
        folder = weights / "dinov2"
    evaluated = context.results.get("evaluate") or context.folder.last("evaluate")
    scores = evaluated.get("trained", {}) if evaluated.get("step") == saved.step else {}
    score = scores.get(f"eval/knn{context.config.evaluate.k}_top1")
    place = public(context.folder.at("weights"))
    text = f"{place} from step {saved.step}: {', '.join(formats)}, loaded back and equal"
    limits = f"; {agreed}" if agreed == ONLY_OURS else ""
    result_line("export", f"{text}{limits}")
    if (of_before := weights / "onnx").is_dir():
        shutil.rmtree(of_before)  # perhaps of another checkpoint than the weights beside it
    onnx = _onnx(context, saved, backbone) if context.config.export.onnx else {}
    details = [f"* {name}: {said}" for name, said in (formats | onnx).items()]
    tracker.note("\n\n".join([text, "\n".join(details), agreed]))
    tracker.artifact(folder / "config.json", "weights")
    now("export: logging the model")
    track = context.config.track
    verdict, rule = model_page.facts(evaluated if scores else {})
    card = ModelCard(
        name=track.register or track.model_name,
        score=score,
        note=" ".join(filter(None, [verdict, text])),
        image_size=known_size(images),
        mean=config.augment.mean,
        std=config.augment.std,
        value_range=value_range,
        metrics=scores,
        params={
            **params(plan),
            "steps": saved.step,
            "steps_planned": plan.steps,
            "weights": ", ".join(formats),
        },
        page=model_page.page(plan, saved.step, images, backbone.width, verdict, formats),
        tags=model_page.tags(plan, context.config.run.name, rule),
        data=evaluated.get("data", ("", "")),
    )
    tracker.model(folder, card)
    size = sum((weights / name / "model.safetensors").stat().st_size for name in formats)
    return {
        "text": text,
        "folder": public(context.folder.at("weights", folder.name)),
        "formats": formats,
        "onnx": onnx,
        "step": saved.step,
        "bytes": size,
        "knn": score,
    }


def scored_size(context: Context, plan: Plan) -> int:
    """Side of the verdict's images, pixels: by today's recipe, else by that of the training."""
    return context.config.evaluate.own_image_size or evaluation_size(plan.config)


def _images(context: Context, plan: Plan) -> Preprocessing:
    """What the verdict's images became."""
    augment, size = plan.config.augment, scored_size(context, plan)
    return Preprocessing(size, augment.mean, augment.std, plan.value_range or FULL)


def _write(
    backbone: VisionTransformer,
    spec: BackboneSpec,
    weights: Path,
    images: Preprocessing,
) -> dict[str, str]:
    """Writes and checks every format; gives what each was compared with."""
    size = known_size(images)
    done = {}
    now("export: dinov2, written and read back")
    folder = save_backbone(backbone, spec, weights / "dinov2")
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_mean": images.mean,
            "image_std": images.std,
            "crop_size": size,
            "resize": evaluation_resize(size),  # both sides, whatever the image's, bicubic
            **deep_key(images.value_range),
        },
    )
    verify(backbone, folder)
    done["dinov2"] = "equal to the bit, read back"
    # Where a library resizes position embeddings in its own way, its images stay at the size of the
    # training: there its features are ours.
    native = replace(images, image_size=spec.image_size)
    everywhere = same_sizes(spec)
    if not without_huggingface(spec):
        now("export: huggingface, written and compared")
        own = images if everywhere[0] else native
        folder = save_huggingface(backbone, spec, weights / "huggingface", own)
        done["huggingface"] = verify_huggingface(backbone, spec, folder) + _cut(own, size)
    now("export: timm, written and compared")
    own = images if everywhere[1] else native
    folder = save_timm(backbone, spec, weights / "timm", own)
    done["timm"] = verify_timm(backbone, spec, folder) + _cut(own, size)
    return done


def _cut(images: Preprocessing, scored: int) -> str:
    """What is to be known where a format takes images of another size than the verdict is of."""
    own = known_size(images)
    if own == scored:
        return ""
    return (
        f"; cuts images to {own} x {own} pixels, for at the {scored} x {scored} of the verdict the "
        "features of this library are others"
    )


def _onnx(
    context: Context, saved: Saved, backbone: VisionTransformer | ForeignBackbone
) -> dict[str, str]:
    """Writes `weights/onnx`; gives what is known of each file, by its name."""
    plan = trained_plan(saved)
    settings = context.config.export
    side = scored_size(context, plan)
    sizes = sorted({side, *settings.onnx_sizes})
    now(f"export: onnx for {', '.join(map(str, sizes))} pixels, written and compared")
    files = save_onnx(
        backbone, context.folder.path / "weights" / "onnx", sizes, _images(context, plan)
    )
    said = {
        file.path.name: f"{file.bytes / 2**20:.1f} MiB, outputs within {file.error:.1g} of torch"
        for file in files
    }
    now("export: onnx, k-NN of each kind")
    native = [file for file in files if file.size == side]
    for name, score in _knn(context, plan, backbone, native).items():
        said[name] += f", {score}"
    for name, sentence in said.items():
        result_line("onnx", f"{name}: {sentence}")
    return said


def _knn(
    context: Context,
    plan: Plan,
    backbone: VisionTransformer | ForeignBackbone,
    files: Sequence[OnnxFile],
) -> dict[str, str]:
    """k-NN of files beside that of the backbone, on the images that training compares."""
    current = {"evaluate": context.config.evaluate, "data": context.config.data}
    config = plan.config.model_copy(update=current)
    spec = evaluation_spec(plan.model_copy(update={"config": config}), context.shards())
    spec = replace(spec, image_size=scored_size(context, plan), half=False)
    limit, threads = config.evaluate.during_training, len(os.sched_getaffinity(0))
    evaluator = Evaluator(spec, threads)
    own = evaluator.top1(backbone, limit)
    if own is None:
        return {}
    said = {}
    for file in files:
        score = evaluator.top1(SessionModule(file.path, threads), limit) or 0.0
        said[file.path.name] = (
            f"k-NN {score:.4f} ({100 * (score - own):+.2f} points, {spec.compared(limit)})"
        )
    return said
