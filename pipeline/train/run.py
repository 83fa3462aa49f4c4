"""The driver's side of pretraining: plan, resume check, Ray Train, outcome."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.config import Config
from pipeline.driver import cluster
from pipeline.driver.compiler import INSTALL, WITHOUT
from pipeline.driver.mailbox import ENDING, console, reporting
from pipeline.driver.signals import stop_on_signals
from pipeline.driver.worker_group import Workers, run_config, torch_config
from pipeline.errors import DataError, PipelineError, StoppedError, TrainError, last_line
from pipeline.heartbeat import doing
from pipeline.images.value_range import FULL, ValueRange, shown
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.plan.resume import changes, plan_of
from pipeline.shards.shards import ShardSet
from pipeline.storage.run_folder import RunFolder, atomic
from pipeline.stream.dealer import DecodeTasks
from pipeline.stream.decoder import StreamSpec
from pipeline.stream.feeder import launch_feeder
from pipeline.stream.order import layout_of
from pipeline.stream.reader import Reading, group_rows, reading_of
from pipeline.train import build
from pipeline.train.checkpoint import state
from pipeline.train.encoders.kept import check_unchanged, without_text
from pipeline.train.evaluator import as_planned, evaluation_spec, in_range
from pipeline.uri import public

if TYPE_CHECKING:
    from pipeline.train.distil.source import Source
    from pipeline.train.worker import Job

log = logging.getLogger("pipeline.train")


@dataclass(frozen=True)
class Outcome:
    """How a training run ended: `finished`, `guarded` where its guard ended it, or `stopped` at a
    step because it was asked to.
    """

    status: str
    step: int
    details: dict[str, Any]


def plan_for(config: Config, shards: ShardSet, machine: Machine) -> Plan:
    """The plan of a config on a shard set and a cluster."""
    return resolve(
        config,
        SetFacts(
            shards.rows,
            shards.digest,
            class_names=shards.class_names,
            image_bytes=shards.image_bytes,
            layout=layout_of(group_rows(shards)),
            value_range=in_range(config, shards).value_range,
        ),
        machine=machine,
    )


def reading_for(plan: Plan, shards: ShardSet) -> Reading:
    """Which rows of the set make up which step."""
    return reading_of(
        shards,
        seed=plan.config.run.seed,
        global_batch=plan.config.optim.global_batch_size,
        window=plan.window_images,
    )


def stream_spec(plan: Plan, shards: ShardSet, store: float) -> StreamSpec:
    """What the read and decode tasks need, with so many bytes of object store in the cluster."""
    config = plan.config
    return StreamSpec(
        columns=as_planned(plan, shards).columns,
        seed=config.run.seed,
        global_batch=config.optim.global_batch_size,
        steps_per_pass=plan.steps_per_pass,
        crops=build.crop_spec(plan),
        photometric=build.photometric_spec(config),
        masks=build.mask_spec(plan),
        chunk=plan.chunk_images,
        max_pixels=config.data.max_image_pixels,
        scaled_decode=config.data.scaled_decode,
        image_bytes=shards.image_bytes,
        store_bytes=store / plan.decode_tasks,
    )


def check_resume(
    config: Config,
    digest: str,
    folder: RunFolder,
    layout: str = "",
    window: int = 0,
    value_range: ValueRange | None = None,
) -> list[str]:
    """What differs, and may, from the run's last checkpoint; empty without one. Needs no Ray.

    The length of the run follows from the config and the shards, so it is checked with them.

    Raises:
        TrainError: with every field that must not change, and where the data set is another one.
    """
    saved = state.latest(folder.checkpoints)
    if saved is None:
        return []
    earlier = plan_of(saved.meta, saved.path)
    allowed, refused = changes(earlier.config, config)
    if earlier.digest != digest:
        refused.append(f"the shards: {earlier.digest} -> {digest}")
    elif layout and earlier.layout not in ("", layout):
        refused.append(f"the row groups of the shards: {earlier.layout} -> {layout}")
    elif window and earlier.window_images != window:
        refused.append(f"images shuffled together: {earlier.window_images} -> {window}")
    was = earlier.value_range or FULL
    if value_range is not None and was != value_range:
        refused.append(f"the range of values: {shown(was)} -> {shown(value_range)} (data.range)")
    if refused:
        raise TrainError(
            f"run {folder.path.name} has a checkpoint at step {saved.step} that was made with "
            f"other values:\n    " + "\n    ".join(refused),
            "give this run another name (run.name=…), or put these values back to resume",
        )
    check_unchanged(earlier, saved, folder)
    return allowed


def pretrain(
    plan: Plan,
    shards: ShardSet,
    folder: RunFolder,
    track: Any,
    tracker: Any = None,
    teacher: Source | None = None,
) -> Outcome:
    """Trains, or goes on training, until the plan's last step or a request to stop.

    Args:
        plan: from `plan_for`.
        shards: the image shards it was made for.
        folder: the run folder.
        track: settings from which rank 0 makes its tracker.
        tracker: the driver's tracker of this stage; takes rank 0's reports where the run folder is
            remote.
        teacher: opens the network whose features are learnt, where the plan names one.

    Raises:
        TrainError: where a loss or gradient is not finite, or the workers failed too often.
    """
    import ray.train

    from pipeline.train.evaluator import launch_evaluator

    stage = folder.stage("pretrain")
    stage.mkdir(parents=True, exist_ok=True)
    tasks = DecodeTasks(plan.decode_cpus, plan.decode_tasks)
    feeder = launch_feeder(
        reading_for(plan, shards),
        stream_spec(plan, shards, cluster.object_store()),
        plan.steps,
        tasks,
        plan.sizes[-1],
        plan.config.resources.streams,
    )
    evaluation = evaluation_spec(plan, shards, guarded=True)
    evaluator = launch_evaluator(evaluation, plan)
    # What the driver writes here must be seen by the workers, or checkpoints would go astray.
    mark = stage / f".shared-{os.urandom(6).hex()}"
    mark.touch()
    job: Job = {
        "mark": "" if folder.uri else str(mark),
        "plan": plan.model_dump_json(),
        "folder": str(folder.at()),
        "feeder": feeder,
        "evaluator": evaluator,
        "evaluated_on": evaluation.evaluated_on(plan.config.evaluate.during_training),
        "guard_key": evaluation.guard_key(plan.config.evaluate.during_training),
        "track": track,
        "teacher": teacher,
    }
    # Ray Train's own records are of this start alone; what resumes a run is in `checkpoints`.
    trainer = _trainer(plan, job, stage / "ray" / f"{os.getpid()}-{os.urandom(3).hex()}")
    with stop_on_signals(feeder):
        try:
            with (
                doing("pretrain: the workers start, or their node is busy"),
                console(feeder, log, "pretrain: no word from the workers"),
                reporting(feeder, tracker),
            ):
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            cause = getattr(error, "controller_failure", None)
            if isinstance(cause, StoppedError):
                return _stopped(folder)
            if isinstance(cause, PipelineError):
                raise cause from None
            raise TrainError(
                f"training failed more than {plan.config.train.max_restarts} times at one "
                f"checkpoint; last: {last_line(error)}",
                "the same command goes on from the last checkpoint; PIPELINE_DEBUG=1 shows all",
            ) from error
        finally:
            mark.unlink(missing_ok=True)
            ray.kill(evaluator)
            ray.kill(feeder)
    return _outcome(plan, folder, result.return_value)


def _trainer(plan: Plan, job: Job, records: Path) -> Any:
    """Ray Train's part: the group of workers, and the rules by which it is resized and restarted.

    Args:
        plan: of the run.
        job: for each worker.
        records: folder for what Ray Train notes of this start.
    """
    import ray
    from ray.train import ScalingConfig

    from pipeline.driver.ray_internals import trainer
    from pipeline.train.loop import train_worker
    from pipeline.train.scaling import Scaling

    per_worker: dict[str, float] = {"CPU": plan.cpus_per_worker}
    if plan.device == "cuda":
        per_worker["GPU"] = plan.gpus_per_worker
    scaling = ScalingConfig(
        num_workers=plan.sizes[-1],
        use_gpu=plan.device == "cuda",
        resources_per_worker=per_worker,
    )
    # beside an evaluator (evaluate.gpu_share) a worker is alone on its GPU
    gpus = plan.config.resources.gpus_per_worker
    workers = Workers(plan.device, gpus, plan.threads, plan.compile)
    feeder = job["feeder"]
    return trainer(
        train_worker,
        Scaling(plan, feeder),
        saved=lambda: ray.get(feeder.saved.remote()),
        train_loop_config=job,
        scaling_config=scaling,
        torch_config=torch_config(workers),
        run_config=run_config(workers, records, plan.config.train.max_restarts),
    )


def _outcome(plan: Plan, folder: RunFolder, left: dict[str, Any] | None) -> Outcome:
    """What rank 0 gave (`loop.train_worker`), or the error that it means."""
    if left is None:
        raise TrainError(
            f"the workers do not all see {folder}: run.folder is not the same place on all nodes",
            "give run.folder as an absolute path of storage that driver and workers share, "
            "or as a URI",
        )
    status = left.pop("status")
    if status == "non_finite":
        raise TrainError(
            f"step {left['step']}: {left['detail']}; stopped before the update",
            "start again under another run.name with a lower optim.lr, a longer optim.warmup or "
            "train.precision=float32; the same command would meet the same step again",
        )
    if status == "no_compiler":
        raise TrainError(f"networks cannot be compiled: {left['detail']}", f"{INSTALL}; {WITHOUT}")
    if status == "bad_images":
        counts = ", ".join(f"{n} {reason}" for reason, n in sorted(left["bad_images"].items()))
        raise DataError(
            f"{sum(left['bad_images'].values())} images could not be used ({counts}), more than "
            f"data.max_bad_fraction={plan.config.data.max_bad_fraction}; they are listed in "
            f"{public(folder.at('pretrain', 'bad_images.parquet'))}",
            "pack the shards again, or raise data.max_bad_fraction and go on with the same command",
        )
    if status == "unsaved":
        raise TrainError(
            f"all {plan.steps} steps are done, but their checkpoint could not be written: "
            f"{left['detail']}",
            "make room, or make the place writable; the same command goes on from the last "
            "checkpoint",
        )
    if status == "stopped":
        left["signal"] = ENDING.number
    return Outcome(status, int(left.pop("step", plan.steps)), left)


def _stopped(folder: RunFolder) -> Outcome:
    """The outcome where no workers were there to leave one."""
    saved = state.latest(folder.checkpoints)
    return Outcome("stopped", saved.step if saved else 0, {"signal": ENDING.number})


def write_plan(plan: Plan, folder: RunFolder) -> Path:
    """`plan.yaml` of the run: the recipe in full and what was derived."""
    import yaml

    path = folder.path / "plan.yaml"
    with atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(without_text(plan), sort_keys=False))
    return path
