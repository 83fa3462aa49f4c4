"""The driver's side of a fine-tuning: workers on the cluster, Ray Train, the outcome."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config.config import Config
from pipeline.driver.mailbox import ENDING, STOP, Mailbox, console, reporting
from pipeline.driver.signals import stop_on_signals
from pipeline.driver.worker_group import Workers, run_config, torch_config
from pipeline.errors import (
    ConfigError,
    PipelineError,
    PlacementError,
    StoppedError,
    TrainError,
    last_line,
)
from pipeline.finetune.settings import Settings
from pipeline.heartbeat import doing
from pipeline.plan.layout import Machine, worker_share
from pipeline.plan.nodes import Share, capacity, missing
from pipeline.shards.columns import BAD_IMAGE_SCHEMA
from pipeline.storage.places import resolve_uri
from pipeline.storage.run_folder import RunFolder
from pipeline.storage.transfer import write_parquet_atomic
from pipeline.train.checkpoint import state
from pipeline.uri import Place, public

log = logging.getLogger("pipeline.finetune")


@dataclass(frozen=True)
class Layout:
    """Where a fine-tuning runs.

    Attributes:
        workers: processes of Ray Train.
        share: what each reserves.
        threads: of torch, and as many that decode, in each.
    """

    workers: int
    share: Share
    threads: int

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        return "cuda" if self.share.gpus else "cpu"


def layout_of(config: Config, machine: Machine, batch_size: int) -> Layout:
    """How many workers a cluster takes, by `train.workers`, `train.device` and `resources`.

    Args:
        config: the recipe.
        machine: the cluster.
        batch_size: images of a step; there are never more workers.

    Raises:
        PlacementError: there is no room for as many as were asked for.
    """
    train, resources = config.train, config.resources
    gpus = 0 if train.device == "cpu" else machine.gpus
    share, asked = worker_share(config, gpus), train.workers
    room = capacity(machine.rooms, share) if gpus or train.device != "cuda" else 0
    fitting = room if gpus else min(room, 8, max(1, machine.cpus // 2))
    fixed = asked if isinstance(asked, int) else asked[0] if isinstance(asked, tuple) else 1
    most = asked if isinstance(asked, int) else asked[1] if isinstance(asked, tuple) else fitting
    workers = min(most, room, batch_size)
    if workers < min(fixed, batch_size):
        worker = {"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {})
        raise PlacementError(
            missing(machine.rooms, fixed, share),
            "lower train.workers, add nodes, or set train.device=cpu",
            [worker] * fixed,
        )
    threads = resources.threads or max(1, machine.cpus // workers)
    return Layout(workers, share, threads)


def precision_of(config: Config, machine: Machine, device: str) -> str:
    """`finetune.precision`, where it says auto what the hardware is fast in."""
    asked = config.finetune.precision
    if asked != "auto":
        return asked
    return "bfloat16" if device == "cuda" or machine.bfloat16 else "float32"


def check_resume(settings: Settings, checkpoints: Place) -> state.Saved | None:
    """The newest checkpoint, if there is one: of the same settings.

    Raises:
        ConfigError: they are others.
    """
    saved = state.latest(checkpoints)
    if saved is None:
        return None
    differing = settings.differs(saved.meta.get("settings", {}))
    if differing:
        raise ConfigError(
            f"{public(checkpoints)} holds step {saved.step} of a fine-tuning with other values:"
            "\n    " + "\n    ".join(differing),
            "give this run another name (run.name=…), or put these values back to resume",
        )
    return saved


def finetune(
    task: Any, layout: Layout, folder: RunFolder, max_restarts: int, tracker: Any
) -> dict[str, Any]:
    """Fine-tunes, or goes on, to the last step or a request to stop; needs a Ray to be joined.

    Args:
        task: a `worker.Task`.
        layout: of the workers.
        folder: of the run; checkpoints and Ray Train's records are below `finetune/` there.
        max_restarts: of the workers without a new checkpoint in between.
        tracker: of the stage.

    Returns:
        what `worker.finetune_worker` gives; `status` is `finished` or `stopped`.

    Raises:
        PipelineError: a loss is not finite, too many images are bad, or workers failed too often.
    """
    import ray
    import ray.train
    from ray.train import ScalingConfig

    from pipeline.driver.ray_internals import trainer
    from pipeline.finetune.worker import finetune_worker

    checkpoints = folder.at("finetune", "checkpoints")
    mailbox = _mailbox()
    per_worker: dict[str, float] = {"CPU": layout.share.cpus}
    if layout.share.gpus:
        per_worker["GPU"] = layout.share.gpus
    scaling = ScalingConfig(
        num_workers=layout.workers,
        use_gpu=layout.device == "cuda",
        resources_per_worker=per_worker,
    )
    records = folder.stage("finetune") / "ray" / f"{os.getpid()}-{os.urandom(3).hex()}"
    workers = Workers(layout.device, layout.share.gpus, layout.threads, compiles=False)
    training = trainer(
        finetune_worker,
        _Fixed(layout.workers, mailbox),
        saved=lambda: ray.get(mailbox.saved.remote()),
        train_loop_config={
            "task": task,
            "mailbox": mailbox,
            "checkpoints": checkpoints,
            "threads": layout.threads,
        },
        scaling_config=scaling,
        torch_config=torch_config(workers),
        run_config=run_config(workers, records, max_restarts),
    )
    with stop_on_signals(mailbox):
        try:
            with (
                doing("finetune: the workers start, or their node is busy"),
                console(mailbox, log, "finetune: no word from the workers"),
                reporting(mailbox, tracker),
            ):
                outcome = training.fit().return_value
        except ray.train.TrainingFailedError as error:
            cause = getattr(error, "controller_failure", None)
            if isinstance(cause, StoppedError):
                saved = state.latest(checkpoints)
                return {"status": "stopped", "step": saved.step if saved else 0, "signal": 0}
            if isinstance(cause, PipelineError):
                raise cause from None
            raise TrainError(
                f"fine-tuning failed more than {max_restarts} times at one checkpoint; last: "
                f"{last_line(error)}",
                "the same command goes on from the last checkpoint; PIPELINE_DEBUG=1 shows all",
            ) from error
        finally:
            ray.kill(mailbox)
    if outcome["status"] == "refused":
        raise TrainError(outcome["what"], outcome["hint"])
    if outcome["status"] == "stopped":
        outcome["signal"] = ENDING.number
    return dict(outcome)


def _mailbox() -> Any:
    """On the driver's node, which is the one that is not taken away."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=16, scheduling_strategy=here)
    return actor.remote()


def write_bad(folder: RunFolder, bad: Mapping[str, tuple[str, str]]) -> None:
    """Writes `finetune/bad.parquet`, a row for each image that could not be decoded.

    Args:
        folder: of the run.
        bad: by id, reason and detail; nothing is written where there is none.
    """
    if not bad:
        return
    rows = [
        {"source": "", "image_id": name, "stage": "finetune", "reason": why, "detail": detail}
        for name, (why, detail) in sorted(bad.items())
    ]
    fs, path = resolve_uri(str(folder.at("finetune", "bad.parquet")))
    table = pa.Table.from_pylist(rows, schema=BAD_IMAGE_SCHEMA)
    write_parquet_atomic(table, fs, path, row_group_size=65_536)


class _Fixed:
    """Rules of a group of one size (`ray_internals.GroupRules`)."""

    def __init__(self, workers: int, mailbox: Any) -> None:
        self.largest, self.mailbox = workers, mailbox

    def next_group(self) -> int | None:
        """The size, unless somebody wants the run to stop."""
        import ray

        if ray.get(self.mailbox.wait_request.remote(0.0)) == STOP:
            raise StoppedError("fine-tuning was stopped", "the same command goes on")
        return self.largest

    def other_group(self, at: list[str]) -> int | None:
        """None: the group stays as it is."""
        del at
        return None
