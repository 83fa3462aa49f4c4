"""What is left of a chain: guesses that stages correct, against sums by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.load import load
from pipeline.plan.layout import Machine
from pipeline.plan.nodes import Node
from pipeline.plan.plan import SetFacts, resolve
from pipeline.stages.console import outlook
from pipeline.stages.console.outlook import AN_IMAGE, FIXED, Earlier, Outlook, outlook_of
from pipeline.track.journal import Journal
from pipeline.train import build, estimate
from pipeline.train.tune.choose import tuned

MACHINE = Machine(cpus=2, gpus=0, bfloat16=True, nodes=(Node(2, driver=True),))


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_what_is_left_is_the_rest_of_this_stage_and_all_to_come() -> None:
    clock = Clock()
    ahead = Outlook({"pack": 10.0, "pretrain": 100.0, "evaluate": 20.0}, clock)
    assert ahead.left() == 130
    ahead.begin("pack")
    clock.seconds = 4
    assert ahead.left() == 126
    clock.seconds = 20  # twice as long as expected
    assert ahead.left() == 120
    ahead.end()
    # the evaluation will take twice as long as well; training has a measure of its own
    assert ahead.left() == 140
    ahead.begin("pretrain")
    assert ahead.left(50.0) == 90
    assert ahead.said(50.0) == " | all 1m 30s"
    clock.seconds = 400
    ahead.end()
    assert ahead.left() == 40  # how long training took says nothing of the evaluation
    ahead.skip("evaluate")
    assert ahead.left() == 0


def test_where_a_stage_is_not_known_nothing_is_said_until_it_says_itself() -> None:
    ahead = Outlook({"pretrain": None, "export": 5.0})
    ahead.begin("pretrain")
    assert ahead.left() is None and ahead.said() == "" and ahead.line() == ""
    assert ahead.left(60.0) == 65
    ahead.end()
    assert ahead.left() == 5


def test_the_guess_of_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlook, "flops_per_s", lambda plan: 1e11)
    monkeypatch.setattr(outlook, "seconds_of", lambda plan, cost: 600.0)
    config = load(["configs/small.yaml", "data.source=photos/"])
    stages = ["pack", "pretrain", "evaluate"]
    ahead = outlook_of(config, stages, 1000, 100, MACHINE)
    assert ahead.expected["pack"] == pytest.approx(FIXED["pack"] + 1100 * AN_IMAGE["pack"])
    assert ahead.expected["pretrain"] == 600 + FIXED["pretrain"]
    assert ahead.line().startswith("about 11 minutes in all (pretrain 10m 30s, evaluate ")
    unknown = outlook_of(config, stages, 0, 0, MACHINE)
    assert set(unknown.expected.values()) == {None}
    # half of the 3,000 steps of 64 images are done, at 32 images a second
    again = outlook_of(config, stages, 1000, 100, MACHINE, Earlier(1500, 32.0))
    assert again.expected["pretrain"] == 1500 * 64 / 32 + FIXED["pretrain"]
    # more images a step than there are: the stage says that, here nothing is known
    few = outlook_of(config, stages, 10, 0, MACHINE)
    assert few.expected["pretrain"] is None


@pytest.mark.parametrize(
    ("recipe", "gpus", "device"), [("vits14", 1, "meta"), ("small", 1, "cpu"), ("small", 0, "cpu")]
)
def test_an_estimate_on_gpus_needs_no_weights(recipe: str, gpus: int, device: str) -> None:
    config = load([f"configs/{recipe}.yaml", "data.source=photos/"])
    nodes = (Node(2, gpus, driver=True),)
    machine = Machine(cpus=2, gpus=gpus, bfloat16=True, nodes=nodes)
    plan = resolve(config, SetFacts(50_000, ""), machine=machine)
    shapes = build.for_estimate(plan)
    assert {one.device.type for one in shapes.student.parameters()} == {device}
    expected = estimate.estimated_cost(plan, build.pair(plan.config))
    assert estimate.estimated_cost(plan, shapes) == expected


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("tune", ["last_blocks=1", "lora(rank=2)", "heads"])
def test_an_estimate_is_of_what_is_trained(tune: str, gpus: int) -> None:
    """What does not learn keeps nothing for a backward pass, and AdamW has nothing for it."""
    sizes = ["model.width=24", "model.depth=3", "model.heads=2", "head.prototypes=50"]
    sides = ["augment.global_size=56", "augment.local_size=28", "optim.steps=10"]
    recipe = [*sizes, *sides, "optim.global_batch_size=32", "train.compile=false"]
    config = load([*recipe, f"train.tune={tune}", "model.init=w.pth"])
    nodes = (Node(2, gpus, driver=True),)
    machine = Machine(cpus=2, gpus=gpus, bfloat16=True, nodes=nodes)
    plan = resolve(config, SetFacts(500, ""), machine=machine)
    estimated = estimate.estimated_cost(plan, build.for_estimate(plan))
    assert estimated == estimate.estimated_cost(plan, tuned(build.pair(config), config))
    whole = estimate.estimated_cost(plan, build.pair(config))
    assert estimated.memory_bytes < whole.memory_bytes
    if not tune.startswith("lora"):  # its updates are in every block
        assert estimated.memory.activations < whole.memory.activations


def test_an_estimate_has_no_heads_where_features_alone_are_learnt() -> None:
    sizes = ["model.width=24", "model.depth=2", "model.heads=2", "augment.global_size=56"]
    small = ["augment.local_size=28", "optim.steps=10", "optim.global_batch_size=32"]
    features = ["distill.teacher=t.onnx", "distill.loss=cosine", "distill.objective=false"]
    config = load([*sizes, *small, *features])
    plan = resolve(config, SetFacts(500, ""), machine=MACHINE)
    plan = plan.model_copy(update={"distil_loss": "cosine"})
    built = build.for_estimate(plan)
    assert plan.headless and built.student.dino_head is None
    heads = sum(p.numel() for p in build.pair(config).student.parameters())
    assert estimate.estimated_cost(plan, built).parameters < heads / 2


def test_a_resume_counts_from_its_checkpoint_at_the_speed_it_had_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context: Any = SimpleNamespace(folder=SimpleNamespace(path=tmp_path, checkpoints=tmp_path))
    saved: list[Any] = [None]
    monkeypatch.setattr(outlook.state, "latest", lambda folder: saved[0])
    journal = Journal(tmp_path / "metrics.jsonl")
    for step, speed in ((49, 20.0), (99, 32.0), (149, math.nan)):
        journal.metrics("pretrain", step, {"perf/images_per_s": speed})
    journal.metrics("pretrain", 160, {"loss/total": 1.0})
    journal.metrics("finetune", 5, {"perf/images_per_s": 500.0})
    journal.close()
    assert outlook._earlier(context) == Earlier()  # killed before its first checkpoint
    saved[0] = SimpleNamespace(step=120)
    assert outlook._earlier(context) == Earlier(120, 32.0)
    (tmp_path / "metrics.jsonl").unlink()
    assert outlook._earlier(context) == Earlier()
