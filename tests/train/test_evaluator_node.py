"""Where the evaluator of a run is put, and which of its scores are compared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.load import load
from pipeline.errors import ConfigError
from pipeline.evaluate.teacher import EvaluatedOn
from pipeline.model.vit import BackboneSpec
from pipeline.plan.layout import Machine
from pipeline.plan.nodes import Node, Share, room
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.train.checkpoint import state
from pipeline.train.evaluations import Evaluations
from pipeline.train.evaluator import EvaluatorActor, device_of, roomiest

KNN = "eval/knn20_top1"


def node(name: str, cpus: float | None, alive: bool = True) -> dict[str, Any]:
    resources = {"memory": 1e9} | ({} if cpus is None else {"CPU": cpus})
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def test_the_living_node_with_the_most_cpus() -> None:
    head = node("head", None)
    assert roomiest([head, node("a", 2), node("b", 8), node("gone", 64, alive=False)]) == "b"
    assert roomiest([head, node("bare", 0)]) == ""  # Ray may choose
    assert roomiest([]) == ""


def plan_on(gpus: int, *fields: str) -> Plan:
    config = load(["optim.steps=10", "optim.global_batch_size=8", *fields])
    nodes = (Node(16, gpus, driver=True),)
    machine = Machine(cpus=16, gpus=gpus, bfloat16=True, nodes=nodes)
    return resolve(config, SetFacts(800, ""), machine)


def test_evaluations_take_a_part_of_a_gpu_a_spare_one_or_cpus() -> None:
    shared = plan_on(2, "evaluate.gpu_share=0.1", "train.workers=2")
    assert (shared.workers, shared.gpus_per_worker) == (2, 0.9)
    assert device_of(shared, 2) == ("cuda", 0.1)
    assert device_of(shared, 3) == ("cuda", 0.1)  # as it was asked for
    assert device_of(plan_on(2, "train.workers=2"), 2) == ("cpu", 0.0)
    assert device_of(plan_on(2, "train.workers=2"), 3) == ("cuda", 1.0)
    assert device_of(plan_on(2, "train.workers=1"), 2) == ("cuda", 1.0)
    assert device_of(plan_on(0, "evaluate.gpu_share=0.1"), 0) == ("cpu", 0.0)
    # four workers on three quarters each leave four quarters, but no GPU
    parts = plan_on(4, "train.workers=4", "resources.gpus_per_worker=0.75")
    assert device_of(parts, 4) == ("cpu", 0.0)
    halves = plan_on(4, "train.workers=4", "resources.gpus_per_worker=0.5")
    assert device_of(halves, 3) == ("cuda", 1.0)


def test_ten_gpus_have_room_for_ten_workers_beside_evaluations() -> None:
    # 10 / 0.9 is 11.1, but a worker takes all of its 0.9 from one GPU
    node = Node(64, 10)
    fields = ["evaluate.gpu_share=0.1", "optim.global_batch_size=110"]
    machine = Machine(cpus=64, gpus=10, bfloat16=True, nodes=(node._replace(driver=True),))
    config = load(["optim.steps=10", *fields])
    assert resolve(config, SetFacts(800, ""), machine).workers == 10
    for gpus, share, workers in (
        (10, 0.9, 10),
        (1.9, 0.9, 2),
        (0.9, 0.9, 1),
        (2, 0.4, 4),
        (1, 1, 1),
    ):
        assert room(Node(64, gpus), Share(1, share)) == workers


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["evaluate.gpu_share=0.1", "resources.gpus_per_worker=0.5"], "workers share one"),
        (["evaluate.gpu_share=0.5"], "less than 0.5"),
        (["evaluate.gpu_share=0.001"], "0.001 of a GPU is too little"),
        (["evaluate.decide_by=depth_linear_rms"], "cannot decide; these scores can: knn10_top1"),
        (["evaluate.decide_by=knn7_top1"], "knn10_top1, knn20_top1, knn100_top1, knn200_top1"),
    ],
)
def test_fields_that_cannot_be_are_said(fields: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(fields)
    assert said in f"{error.value.what} {error.value.hint}"
    load(["evaluate.decide_by=knn7_top1", "evaluate.k=7"])


def test_the_best_is_begun_anew_where_other_images_are_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (10, 20):
        state.save(folder, step, {"model": {"w": torch.ones(1)}}, {"step": step})
    settings = SimpleNamespace(config=SimpleNamespace(evaluate=SimpleNamespace(k=20)))

    def evaluations(compared: str) -> Evaluations:
        return Evaluations(settings, None, None, tmp_path, EvaluatedOn(compared))  # type: ignore[arg-type]

    first = evaluations("a")
    first.choice.note(10, 0.9, KNN)
    again = evaluations("a")
    assert again.best_summary == {"step": 10, "score": 0.9, "name": KNN} and not caplog.records
    again.choice.note(20, 0.5, KNN)
    best = state.best(folder)
    assert best and (best[0].step, best[1].score) == (10, 0.9)
    other = evaluations("b")
    assert other.choice.best is None
    assert "(step 10, score 0.9000) was evaluated with other images or settings" in caplog.text
    best = state.best(folder)  # until another is known
    assert best and best[0].step == 10
    other.choice.note(20, 0.5, KNN)
    best = state.best(folder)
    assert best and (best[0].step, best[1].score) == (20, 0.5)
    assert evaluations("b").best_summary == {"step": 20, "score": 0.5, "name": KNN}


def test_the_network_that_is_evaluated_has_the_weights_that_were_sent(
    recwarn: pytest.WarningsRecorder,
) -> None:
    spec = BackboneSpec(image_size=8, patch_size=4, width=8, depth=1, heads=2)
    sent = {name: value.numpy() for name, value in spec.build().state_dict().items()}
    for value in sent.values():
        value.flags.writeable = False  # as Ray gives arrays out of its store
    actor = EvaluatorActor.__new__(EvaluatorActor)
    actor.backbone = spec
    actor.evaluator = SimpleNamespace(run=lambda backbone, limit: (backbone, limit))  # type: ignore[assignment]
    backbone, limit = actor.run(sent, 7)  # type: ignore[misc]
    assert limit == 7
    for name, value in backbone.state_dict().items():
        assert np.array_equal(value.numpy(), sent[name]), name
    assert not recwarn.list
