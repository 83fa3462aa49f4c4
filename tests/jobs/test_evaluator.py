"""Evaluators on a real Ray: one that hangs, one that dies, one on a part of a GPU; and a training
that goes on to its end beside one that hangs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from pipeline.evaluate.teacher import Evaluation
from pipeline.track.journal import read_steps
from pipeline.train import evaluations as module
from pipeline.train.evaluations import Evaluations
from pipeline.train.evaluator import Weights
from tests.data import encoded, stored
from tests.jobs.conftest import ROOT
from tests.tiny import STEPS

SCORE = "eval/knn20_top1"
pytestmark = pytest.mark.slow


class Planted:
    """Hangs or dies where the weights of its step say so, and writes down each call."""

    def __init__(self, folder: str, hangs: list[float], dies: list[float]) -> None:
        self.folder, self.hangs, self.dies = Path(folder), hangs, dies

    def run(self, weights: Weights, limit: int | None) -> Evaluation:
        value = float(weights["bias"][0])
        calls = self.folder / f"{value:g}"
        before = calls.stat().st_size if calls.exists() else 0
        with calls.open("a") as file:
            file.write(".")
        if value in self.hangs:
            threading.Event().wait()
        if value in self.dies and not before:
            os._exit(1)
        return Evaluation({SCORE: value}, decided_by=SCORE)


class Tracker:
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.rows.setdefault(step, {}).update(values)

    def headline(self, step: int, values: dict[str, float]) -> None: ...


def evaluations_of(actor: Any, folder: Path) -> Evaluations:
    config = SimpleNamespace(
        evaluate=SimpleNamespace(k=20, during_training=9), head=SimpleNamespace(prototypes=64)
    )
    plan = SimpleNamespace(config=config, steps=100, warmup_steps=999, temperature_warmup_steps=0)
    return Evaluations(plan, actor, Tracker(), folder, "")  # type: ignore[arg-type]


def weights_of(step: int) -> Any:
    linear = torch.nn.Linear(1, 1)
    with torch.no_grad():
        linear.bias.fill_(step)
    return linear


@pytest.mark.usefixtures("ray_cluster")
def test_after_a_hang_and_a_death_there_are_evaluations_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the workers of the tests' cluster cannot import a test
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actor = ray.remote(Planted).options(num_cpus=0, max_restarts=3, max_task_retries=1)
    evaluator = actor.remote(str(tmp_path), [20.0], [10.0])
    evaluations = evaluations_of(evaluator, tmp_path)
    for step in (0, 10):  # at 10 its process dies, and starts again
        evaluations.request(step, weights_of(step))
        evaluations.wait(120)
    evaluations.request(20, weights_of(20))
    evaluations.request(30, weights_of(30))
    evaluations.wait(2)
    assert evaluations.pending_steps() == {20, 30}
    monkeypatch.setattr(module, "HANGING_S", 0.0)
    monkeypatch.setattr(module, "HANGING_TIMES", 0)
    evaluations.collect()
    monkeypatch.undo()
    assert evaluations.pending_steps() == set()
    evaluations.request(40, weights_of(40))
    evaluations.wait(120)
    assert evaluations.tracker.rows == {s: {SCORE: float(s)} for s in (0, 10, 40)}
    assert evaluations.said() == "evaluations: 2 failed"
    calls = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.name.isdigit()}
    assert calls["10"] == 2  # Ray began it again
    assert calls["20"] == 1  # but not what was given up
    ray.kill(evaluator)


ON_GPUS = """
import os, sys, tempfile
import ray
from ray.util.placement_group import placement_group
from pipeline.config.load import load
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve
from pipeline.train.evaluator import launch_evaluator
from pipeline.evaluate.teacher import EvaluationSpec
from pipeline.shards.shards import open_shards

ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, logging_level="error",
         object_store_memory=100 * 2**20, _temp_dir=tempfile.mkdtemp(prefix="rd"))
config = load(["evaluate.gpu_share=0.1", "optim.steps=10", "optim.global_batch_size=8",
               "resources.cpus_per_worker=0.25"])
plan = resolve(config, SetFacts(800, ""), Machine(cpus=2, gpus=2, bfloat16=True))
assert plan.workers == 2, plan.workers
spec = EvaluationSpec(open_shards(sys.argv[1]), None, None, 16, 5, 0.07, (0.5,) * 3, (0.2,) * 3,
                      16, 0, 1000)
workers = placement_group([{"CPU": plan.cpus_per_worker, "GPU": plan.gpus_per_worker}] * 2)
ray.get(workers.ready(), timeout=60)  # the workers are there first, as after a restart
evaluator = launch_evaluator(spec, plan)
gpus = ray.get(evaluator.__ray_call__.remote(
    lambda self: (ray.get_gpu_ids(), str(self.evaluator.device))), timeout=120)
assert gpus[0] in ([0], [1]) and gpus[1] == "cuda", gpus
print("placed", gpus)
"""


def test_an_evaluator_is_placed_beside_workers_on_their_gpus(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    image = encoded(np.zeros((16, 16, 3), np.uint8))
    shards = stored({"image": [image] * 4, "label": [0, 1, 0, 1]}, tmp_path / "part.parquet", 4)
    shown = subprocess.run(
        [sys.executable, "-c", ON_GPUS, shards.uri],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "placed" in shown.stdout, shown.stdout + shown.stderr


HANGING = """
import sys, threading
import ray
from pipeline.job import main
from pipeline.train import evaluator, loop

class Hanging:
    def run(self, weights, limit):
        threading.Event().wait()

def launched(spec, plan):
    return ray.remote(Hanging).options(num_cpus=0).remote()

def impatient(job):
    from pipeline.train import evaluations
    from pipeline.train.loop import train_worker  # that of the worker, which nobody has replaced
    evaluations.END_S = 2.0
    return train_worker(job)

if __name__ == "__main__":
    evaluator.launch_evaluator = launched
    loop.train_worker = impatient
    main(["pack", "pretrain"], "", sys.argv[1:])
"""


def test_a_training_beside_an_evaluator_that_hangs_takes_all_its_steps(
    images: Path, recipe: Path, cluster_environment: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    shown = subprocess.run(
        [
            *[sys.executable, script, recipe, f"data.source={images}/train"],
            *[f"run.folder={tmp_path}", "train.eval_every=10"],
        ],
        env=cluster_environment | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    rows = read_steps(tmp_path / "tiny" / "metrics.jsonl", "pretrain")
    assert [s for s, row in rows.items() if "loss/total" in row] == list(range(STEPS))
    skipped = {s: row["eval/skipped"] for s, row in rows.items() if "eval/skipped" in row}
    assert skipped == {20: 1, 30: 2}
    done = json.loads((tmp_path / "tiny" / "pretrain" / "_done.json").read_text())["result"]
    assert done["status"] == "finished" and done["best"] is None
    assert done["text"].endswith("evaluations: 2 skipped, 3 failed")
    # no checkpoint is kept for an answer that never comes
    kept = sorted(x.name for x in (tmp_path / "tiny" / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (STEPS - 5, STEPS)]
