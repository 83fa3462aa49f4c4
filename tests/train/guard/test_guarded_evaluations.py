"""Evaluations beside a guard: the start comes first and again, the best is a checkpoint that did
not fall, and the outcome of a run says so.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.evaluate.guard.answers import Answers
from pipeline.evaluate.score import Score
from pipeline.evaluate.teacher import EvaluatedOn, Evaluation
from pipeline.train import evaluations as module
from pipeline.train.checkpoint import state
from pipeline.train.evaluations import Evaluations
from pipeline.train.guard.decision import LEFT, Limits
from pipeline.train.guard.end import guarded
from pipeline.train.guard.guard import Guard
from tests.train.guard.test_decision import structure

KNN, N, STEPS = "eval/knn20_top1", 300, 60
IDS = np.random.default_rng(0).integers(0, 256, (N, 16), dtype=np.uint8)
PLAN: Any = SimpleNamespace(
    config=SimpleNamespace(
        evaluate=SimpleNamespace(k=20, during_training=100),
        head=SimpleNamespace(prototypes=64),
        optim=SimpleNamespace(lr=0.5),
    ),
    steps=STEPS,
    warmup_steps=99,
    temperature_warmup_steps=0,
    lr=0.25,  # scaled by the batch
)


class Tracker:
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.said: dict[str, str] = {}

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.rows.setdefault(step, {}).update(values)

    def headline(self, step: int, values: dict[str, float]) -> None: ...

    def tags(self, values: dict[str, str]) -> None:
        self.said |= values


class Evaluator:
    """Answers at once; an answer that is an error is raised."""

    def __init__(self, *answers: Evaluation | Exception) -> None:
        self.answers, self.weights = list(answers), list[Any]()
        self.run = SimpleNamespace(remote=self._asked)

    def _asked(self, weights: Any, limit: int) -> Any:
        self.weights.append(weights)
        return self.answers.pop(0)


def scored(share: float, keep: float | None = None) -> Evaluation:
    hits = (np.arange(N) < share * N).astype(float)
    kept = None
    if keep is not None:
        kept = Score.of_hits("knn20_top1", (np.arange(N) < keep * N).astype(float), IDS)
    answers = Answers(Score.of_hits("knn20_top1", hits, IDS), None, kept)
    return Evaluation({KNN: share}, decided_by=KNN, answers=answers)


def unlabelled(noise: float) -> Evaluation:
    answers = Answers(None, structure(3, noise))
    return Evaluation({"eval/rank_me": 3.0}, decided_by="", answers=answers)


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(module.ray, "get", get)
    monkeypatch.setattr(module.ray, "cancel", lambda reference: None)
    monkeypatch.setattr(module, "LOOK_S", 0.01)


def evaluations_of(folder: Path, evaluator: Any, key: str = "a", first: int = 0) -> Evaluations:
    checkpoints = folder / "checkpoints"
    for step in range(first, STEPS + 1, 10):
        state.save(checkpoints, step, {"teacher": {"backbone.w": torch.ones(1)}}, {})
    start = {"w": np.zeros(1, np.float32)}
    guard = Guard(Limits(2, 0.5, 0.01), checkpoints, key, lambda: start)
    return Evaluations(PLAN, evaluator, Tracker(), folder, EvaluatedOn(key), None, guard)


def run(evaluations: Evaluations, *steps: int) -> None:
    for step in steps:
        evaluations.request(step, {"w": torch.full((1,), float(step))})
        evaluations.wait(60)


def test_a_fall_keeps_the_start(tmp_path: Path) -> None:
    evaluations = evaluations_of(tmp_path, Evaluator(scored(0.7), scored(0.3), scored(0.2)))
    run(evaluations, 0, 10)
    guard = evaluations.guard
    assert guard is not None and guard.ended is None
    assert 0 in evaluations.pending_steps()  # its checkpoint stays, whatever comes
    run(evaluations, 20)
    assert guard.ended is not None
    assert evaluations.best_summary == {"step": 0, "score": 0.7, "name": KNN}
    best = state.best(evaluations.checkpoints)
    assert best is not None and best[0].step == 0
    tracker = evaluations.tracker
    assert tracker.rows[20]["guard/falls"] == 2 and tracker.rows[10]["guard/falls"] == 1
    outcome = guarded(
        {"status": "stopped", "step": 23}, guard, PLAN, evaluations.best_summary, tracker
    )
    assert outcome["status"] == "guarded" and outcome["step"] == 23
    assert "the weights it started from are kept (knn20_top1 0.7000)" in outcome["guard"]
    assert "lower optim.lr (it was 0.5)" in outcome["guard"]
    assert tracker.said["guard"] == outcome["guard"] and tracker.rows[23]["guard/ended"] == 1


def test_a_good_run_is_left_alone(tmp_path: Path) -> None:
    shares = (0.5, 0.55, 0.48, 0.6, 0.65)
    evaluations = evaluations_of(tmp_path, Evaluator(*map(scored, shares)))
    run(evaluations, 0, 10, 20, 30, 40)
    guard = evaluations.guard
    assert guard is not None and guard.ended is None
    assert evaluations.best_summary == {"step": 40, "score": 0.65, "name": KNN}
    outcome = {"status": "finished"}
    assert guarded(outcome, guard, PLAN, evaluations.best_summary, Tracker()) is outcome


def test_the_best_has_not_fallen_and_has_forgotten_nothing(tmp_path: Path) -> None:
    answers = scored(0.5, 0.8), scored(0.6, 0.8), scored(0.9, 0.5), scored(0.7, 0.8)
    evaluations = evaluations_of(tmp_path, Evaluator(*answers))
    run(evaluations, 0, 10, 20, 30)
    assert evaluations.best_summary == {"step": 30, "score": 0.7, "name": KNN}
    assert evaluations.tracker.rows[20]["guard/keep_falls"] == 1


def test_a_start_that_fails_is_asked_again_and_the_others_wait_for_it(tmp_path: Path) -> None:
    evaluator = Evaluator(ValueError("lost"), scored(0.7), scored(0.3), scored(0.2))
    evaluations = evaluations_of(tmp_path, evaluator)
    run(evaluations, 0, 10)
    guard = evaluations.guard
    assert guard is not None and guard.start is not None
    assert [float(w["w"][0]) for w in evaluator.weights] == [0.0, 0.0, 10.0]
    assert evaluations.choice.best is not None and evaluations.choice.best.step == 0
    run(evaluations, 20)
    assert guard.ended is not None and guard.ended.step == 20


def test_without_its_start_the_rest_goes_on_as_without_a_guard(tmp_path: Path) -> None:
    lost = [ValueError("lost")]
    answers = [*lost, *lost, scored(0.3), *lost, scored(0.4)]
    evaluations = evaluations_of(tmp_path, Evaluator(*answers))
    run(evaluations, 0, 10)
    assert evaluations.choice.best is None
    assert 10 in evaluations.pending_steps()  # it waits for the start
    run(evaluations, 20)
    assert evaluations.best_summary == {"step": 20, "score": 0.4, "name": KNN}
    assert evaluations.guard is not None and not evaluations.guard.waits


def test_a_run_that_ends_before_its_start_is_known_keeps_the_best_all_the_same(
    tmp_path: Path,
) -> None:
    error = RuntimeError("lost")
    evaluations = evaluations_of(tmp_path, Evaluator(error, error, scored(0.6)))
    run(evaluations, 0, STEPS)
    assert (
        evaluations.choice.best is None
        and evaluations.guard is not None
        and evaluations.guard.waits
    )
    evaluations.finish()
    assert evaluations.best_summary == {"step": STEPS, "score": 0.6, "name": KNN}
    assert not evaluations.late


def test_after_a_restart_the_start_is_not_asked_again_unless_the_images_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(evaluations_of(tmp_path, Evaluator(scored(0.7), scored(0.3))), 0, 10)
    again = evaluations_of(tmp_path, evaluator := Evaluator(scored(0.3), scored(0.2)), first=10)
    run(again, 10, 20)  # what was under way at 10 is asked again
    assert len(evaluator.weights) == 2
    assert again.guard is not None and again.guard.ended is not None
    assert again.choice.best is not None and again.choice.best.step == 0
    (tmp_path / "checkpoints" / "guard.json").unlink()
    answers = scored(0.9), scored(0.8), scored(0.85)
    other = evaluations_of(tmp_path, evaluator := Evaluator(*answers), key="b", first=10)
    assert "evaluated with other images or settings" in caplog.text
    run(other, 30)
    assert [float(w["w"][0]) for w in evaluator.weights] == [0.0, 30.0]
    assert other.guard is not None and other.guard.falls.rows["score"] == [30]
    assert other.best_summary == {"step": 0, "score": 0.9, "name": KNN}


def test_without_labels_the_newest_that_did_not_fall_is_kept(tmp_path: Path) -> None:
    answers = unlabelled(0.0), unlabelled(0.1), unlabelled(0.2), unlabelled(1.0), unlabelled(1.0)
    evaluations = evaluations_of(tmp_path, Evaluator(*answers))
    run(evaluations, 0, 10, 20)
    assert evaluations.choice.best is not None and evaluations.choice.best.step == 20
    assert (
        evaluations.choice.best.name == f"guard/{LEFT}" and 0.5 < evaluations.choice.best.score < 1
    )
    run(evaluations, 30, 40)
    assert evaluations.guard is not None and evaluations.guard.ended is not None
    assert evaluations.choice.best.step == 20


def test_a_step_that_is_not_finite_ends_as_guarded_where_there_is_a_best(tmp_path: Path) -> None:
    evaluations = evaluations_of(tmp_path, Evaluator(scored(0.7)))
    guard, tracker = evaluations.guard, evaluations.tracker
    error = {"status": "non_finite", "step": 3, "detail": "not finite: loss/ibot"}
    assert guarded(dict(error), guard, PLAN, None, tracker)["status"] == "non_finite"
    assert guarded(dict(error), None, PLAN, None, tracker)["status"] == "non_finite"
    run(evaluations, 0)
    outcome = guarded(dict(error), guard, PLAN, evaluations.best_summary, tracker)
    assert outcome["status"] == "guarded"
    assert "after step 3 of 60: step 3: not finite: loss/ibot; the weights it" in outcome["guard"]
