"""The export stage: the teacher's backbone as weights that other programs load."""

from __future__ import annotations

from typing import Any

from pipeline.files import fingerprint, write_json
from pipeline.model.weights import save_backbone, verify
from pipeline.stages.context import Context, result_line
from pipeline.stages.evaluate import chosen, teacher, trained_plan
from pipeline.train import build


def key(context: Context) -> str:
    """Changes with the checkpoint."""
    saved = chosen(context)
    return fingerprint([saved.step, saved.meta["plan"]])


def intact(context: Context) -> bool:
    """Whether what a finished stage wrote is still there."""
    return (context.folder.path / "weights" / "dinov2" / "model.safetensors").is_file()


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Writes `weights/dinov2/`, loads it back and compares outputs before it says done."""
    saved = chosen(context)
    config = trained_plan(saved).config
    backbone = teacher(saved).backbone.eval()
    folder = context.folder.path / "weights" / "dinov2"
    save_backbone(backbone, build.backbone_spec(config), folder)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_mean": config.augment.mean,
            "image_std": config.augment.std,
            "crop_size": config.augment.global_size,
            "resize": "shorter side to 256/224 of crop_size (to crop_size if smaller), bicubic",
        },
    )
    verify(backbone, folder)
    scores = context.results.get("evaluate", {}).get("trained", {})
    score = scores.get(f"eval/knn{context.config.evaluate.k}_top1")
    text = f"{folder} from step {saved.step}, loaded back and equal"
    result_line("export", text)
    tracker.note(text)
    tracker.artifact(folder / "config.json", "weights")
    tracker.model(
        folder,
        context.config.track.model_name,
        score,
        note=text,
        image_size=config.augment.global_size,
        mean=config.augment.mean,
        std=config.augment.std,
    )
    size = (folder / "model.safetensors").stat().st_size
    return {"text": text, "folder": str(folder), "step": saved.step, "bytes": size, "knn": score}
