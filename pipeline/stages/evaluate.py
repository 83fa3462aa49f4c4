"""The evaluate stage: the trained teacher beside the network at step 0 and raw pixels."""

from __future__ import annotations

from typing import Any

from pipeline.errors import TrainError
from pipeline.evaluate.teacher import EvaluationSpec, Evaluator
from pipeline.files import fingerprint
from pipeline.plan import Plan
from pipeline.stages.context import Context, result_line
from pipeline.stages.pretrain import plan
from pipeline.train import build, state
from pipeline.train.run import evaluation_spec


def chosen(context: Context) -> state.Saved:
    """The checkpoint that `export.checkpoint` means.

    Raises:
        TrainError: where the run has none.
    """
    folder = context.folder.path / "checkpoints"
    best = state.best(folder) if context.config.export.checkpoint == "best" else None
    saved = best[0] if best else state.latest(folder)
    if saved is None:
        raise TrainError(
            f"run {context.folder.path.name} has no checkpoint in {folder}",
            "pretrain first, or name the run with run.name=…",
        )
    return saved


def teacher(saved: state.Saved, found: Plan) -> Any:
    """The teacher's backbone of a checkpoint."""
    pair = build.pair(found.config)
    pair.teacher.load_state_dict(saved.load()["teacher"])
    return pair.teacher.backbone


def key(context: Context) -> str:
    """Changes with the checkpoint and the evaluation settings."""
    saved, config = chosen(context), context.config
    return fingerprint([saved.step, saved.meta["digest"], config.evaluate.model_dump(mode="json")])


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Evaluates on the full sets; without labels, health only."""
    import ray

    saved, found = chosen(context), plan(context)
    spec = evaluation_spec(found, context.shards())
    gpus = 1 if found.device == "cuda" else 0
    threads = 1 if gpus else max(1, int(ray.cluster_resources().get("CPU", 1)))
    task = ray.remote(_evaluate).options(num_cpus=1, num_gpus=gpus)
    results, pictures = ray.get(
        task.remote(spec, found.model_dump_json(), str(saved.path), threads)
    )
    tracker.metrics(saved.step, results["trained"])
    score = f"eval/knn{spec.k}_top1"
    others = {name: values[score] for name, values in results.items() if score in values}
    for name in ("step0", "raw_pixels"):
        if name in others:
            tracker.metrics(saved.step, {f"{score}_{name}": others[name]})
    for name, picture in pictures.items():
        tracker.picture(name, saved.step, picture)
    if score in results["trained"]:
        tracker.headline(saved.step, {score: results["trained"][score]})
        text = (
            f"kNN-{spec.k} top-1 {others['trained']:.4f} at step {saved.step}; "
            f"the same network at step 0 {others['step0']:.4f}, "
            f"raw pixels {others['raw_pixels']:.4f}"
        )
    else:
        health = results["trained"]
        text = "no labels; " + ", ".join(
            f"{name.partition('/')[2]} {value:.3g}" for name, value in health.items()
        )
    result_line("evaluate", text)
    tracker.note(text)
    tracker.table(
        "evaluation",
        {
            "what": list(results),
            "top1": [results[name].get(score) for name in results],
        },
    )
    return {"step": saved.step, "text": text, **{k: dict(v) for k, v in results.items()}}


def _evaluate(
    spec: EvaluationSpec, plan_json: str, checkpoint: str, threads: int
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    from pathlib import Path

    found = Plan.model_validate_json(plan_json)
    evaluator = Evaluator(spec, threads)
    saved = next(
        saved
        for saved in state.checkpoints(Path(checkpoint).parent)
        if str(saved.path) == checkpoint
    )
    trained = evaluator.run(teacher(saved, found))
    results = {"trained": trained.metrics}
    if spec.queries is not None:
        start = evaluator.run(build.pair(found.config).teacher.backbone)
        results["step0"] = start.metrics
        results["raw_pixels"] = {f"eval/knn{spec.k}_top1": evaluator.raw_pixels() or 0.0}
    return results, trained.pictures
