"""The evaluate stage: the trained teacher beside the network at step 0 and raw pixels."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.config import Config
from pipeline.context import Context, result_line
from pipeline.embed.embedders import BACKBONE, EmbedderSpec
from pipeline.embed.folder import remove_vectors
from pipeline.embed.load import load_teacher
from pipeline.embed.run import Request, embed_set
from pipeline.embed.vectors import VectorSet, labelled
from pipeline.errors import PipelineError, TrainError
from pipeline.evaluate.health import alarm
from pipeline.evaluate.knn import LabelledFeatures
from pipeline.evaluate.sets import remarks
from pipeline.evaluate.teacher import EvaluationSpec, Evaluator
from pipeline.heartbeat import now
from pipeline.model.pair import Encoder
from pipeline.plan.plan import Plan
from pipeline.plan.resume import plan_of
from pipeline.shards.shard_set import ShardSet
from pipeline.shards.shards import open_shards
from pipeline.storage.run_folder import RunFolder, fingerprint
from pipeline.train import state
from pipeline.train.run import evaluation_spec
from pipeline.train.start import encoder_of, starting_pair
from pipeline.uri import is_uri, public

log = logging.getLogger("pipeline.evaluate")
TRAINED, FIRST = "trained", "step0"
Tables = dict[str, dict[str, VectorSet]]  # by network, then by set


def chosen(context: Context) -> state.Saved:
    """The checkpoint that `export.checkpoint` means.

    Raises:
        TrainError: where the run has none.
    """
    return chosen_in(context.folder, context.config)


def chosen_in(run: RunFolder, config: Config) -> state.Saved:
    """As `chosen`, before a stage starts."""
    folder = run.checkpoints
    best = state.best(folder) if config.export.checkpoint == "best" else None
    saved = best[0] if best else state.latest(folder)
    if saved is None:
        raise TrainError(
            f"run {run.path.name} has no checkpoint in {public(folder)}",
            "pretrain first, or name the run with run.name=…",
        )
    return saved


def trained_plan(saved: state.Saved) -> Plan:
    """The plan that a checkpoint was trained with; today's recipe may differ."""
    return plan_of(saved.meta, saved.path)


def teacher(saved: state.Saved) -> Encoder:
    """The teacher of a checkpoint, heads included."""
    return encoder_of(saved)[0]


def key(context: Context) -> str:
    """Changes with the checkpoint, the evaluation settings and the images of the sets."""
    saved, settings = chosen(context), context.config.evaluate
    data = context.config.data
    digests = [
        open_shards(uri, data.image_column, data.label_column, f"evaluate.{name}").digest
        for name in ("reference", "queries")
        if (uri := getattr(settings, name))
    ]
    return fingerprint([state.identity(saved), settings.model_dump(mode="json"), digests])


def intact(context: Context) -> bool:
    """Its result is all that it leaves."""
    del context
    return True


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Evaluates on the full sets; without labels, health only."""
    import ray

    saved = chosen(context)
    plan = trained_plan(saved)
    current = {"evaluate": context.config.evaluate, "data": context.config.data}
    plan = plan.model_copy(update={"config": plan.config.model_copy(update=current)})
    shards = context.shards()
    spec = evaluation_spec(plan, shards)
    noted = remarks(plan.config, shards)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 and plan.device == "cuda" else 0
    tables = _tables(context, saved, spec)
    task = ray.remote(_evaluate).options(num_cpus=1, num_gpus=gpus)
    now(f"evaluate: the teacher of step {saved.step}, the network at step 0, raw pixels")
    device = "cuda" if gpus else "cpu"
    # of one set alone, a sample: this task decodes it on its own
    limit = None if spec.queries else plan.config.evaluate.during_training
    results, pictures = ray.get(task.remote(spec, str(saved.path), device, tables, limit))
    if FIRST in tables:  # the vectors of random weights are of no more use
        for vectors in tables[FIRST].values():
            remove_vectors(vectors.uri)
    sentence = alarm(results[TRAINED], plan.config.head.prototypes)
    tracker.metrics(saved.step, results[TRAINED])
    score = f"eval/knn{spec.k}_top1"
    others = {name: values[score] for name, values in results.items() if score in values}
    for name in (FIRST, "raw_pixels"):
        if name in others:
            tracker.metrics(saved.step, {f"{score}_{name}": others[name]})
    for name, picture in pictures.items():
        tracker.picture(name, saved.step, picture)
    if score in results[TRAINED]:
        tracker.headline(saved.step, {f"{score}_final": results[TRAINED][score]})
        beside = {FIRST: "the same network at step 0", "raw_pixels": "raw pixels"}
        text = f"kNN-{spec.k} top-1 {others[TRAINED]:.4f} at step {saved.step} "
        text += f"({spec.compared(limit)}); " + ", ".join(
            f"{what} {others[name]:.4f}" for name, what in beside.items() if name in others
        )
        text = "; ".join([text, *noted])
    else:
        health = results[TRAINED]
        text = "no labels; " + ", ".join(
            f"{name.partition('/')[2]} {value:.3g}" for name, value in health.items()
        )
    result_line("evaluate", text)
    if sentence:
        log.warning("%s", sentence)
        text = f"{text}. Alarm: {sentence}"
    tracker.note(text)
    tracker.table(
        "evaluation",
        {
            "what": list(results),
            "top1": [results[name].get(score) for name in results],
            "of": [spec.compared(limit)] * len(results),
        },
    )
    numbers = {name: dict(values) for name, values in results.items()}
    return {"step": saved.step, "text": text, "remarks": noted, **numbers}


def _tables(context: Context, saved: state.Saved, spec: EvaluationSpec) -> Tables:
    """Vectors of both sets, by the teacher and by the network at step 0, of the embed stage's kind;
    nothing without labels.
    """
    if not (spec.queries and spec.reference):
        return {}
    trained = state.identity(saved)
    networks = {TRAINED: (load_teacher, trained), FIRST: (first_backbone, f"{trained} at step 0")}
    gpu = trained_plan(saved).device == "cuda"
    tables: Tables = {}
    for name, (load, digest) in networks.items():
        model = EmbedderSpec(
            BACKBONE,
            name=f"{public(saved.path)} ({name})",
            digest=digest,
            load=partial(load, str(saved.path)),
            image_size=spec.image_size,
            mean=spec.mean,
            std=spec.std,
            batch_size=spec.batch_size,
            half=spec.half,
        )
        try:
            tables[name] = {
                what: embed_set(
                    Request(model, shards, max_pixels=spec.max_pixels, gpu=gpu),
                    str(context.folder.at("evaluate", "vectors", name, what)),
                    replaced=True,
                ).vectors
                for what, shards in (("reference", spec.reference), ("queries", spec.queries))
            }
        except PipelineError as error:  # model.init may be gone by now; the result is still one
            if name == TRAINED:
                raise
            log.warning("step 0 is not evaluated: %s", error.what)
    return tables


def first_backbone(checkpoint: str) -> Any:
    """In a task: the network that a checkpoint's training began with.

    Raises:
        PipelineError: the checkpoint is gone, or the weights that it began with.
    """
    return starting_pair(trained_plan(_saved(checkpoint)))[0].teacher.backbone


def _saved(checkpoint: str) -> state.Saved:
    saved = state.at(checkpoint if is_uri(checkpoint) else Path(checkpoint))
    if saved is None:
        raise TrainError(f"the checkpoint {public(checkpoint)} is gone", "evaluate again")
    return saved


def _evaluate(
    spec: EvaluationSpec,
    checkpoint: str,
    device: str,
    tables: Tables,
    limit: int | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    saved = _saved(checkpoint)
    plan = trained_plan(saved)
    evaluator = Evaluator(spec, len(os.sched_getaffinity(0)), device)
    network = teacher(saved)
    # Decodes all images once, and keeps them for the pictures where they are few.
    raw = evaluator.raw_pixels()

    def stored(name: str) -> dict[ShardSet, LabelledFeatures]:
        sets = (("reference", spec.reference), ("queries", spec.queries))
        vectors = tables.get(name, {})
        return {x: labelled(vectors[what]) for what, x in sets if x is not None and vectors}

    trained = evaluator.run(network.backbone, limit, stored=stored(TRAINED))
    temperature = plan.at(max(0, saved.step - 1)).teacher_temperature
    results = {TRAINED: trained.metrics | evaluator.target_health(network, temperature)}
    if FIRST in tables:
        first = first_backbone(checkpoint)
        results[FIRST] = evaluator.run(first, limit, stored=stored(FIRST)).metrics
    if raw is not None:
        results["raw_pixels"] = {f"eval/knn{spec.k}_top1": raw}
    return results, trained.pictures
