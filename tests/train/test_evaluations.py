"""Evaluations that are late, hang, fail or die: no step waits, and nothing is lost unsaid."""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import cloudpickle

from pipeline.evaluate.teacher import EvaluatedOn, Evaluation
from pipeline.train import evaluations as module
from pipeline.train.checkpoint import state
from pipeline.train.checkpoint.best import Best, read_best, write_best
from pipeline.train.evaluations import Evaluations
from pipeline.train.evaluator import Weights
from pipeline.train.parallel.strategy import whole_weights

STEPS, KNN = 40, "eval/knn20_top1"


class Tracker:
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.rows.setdefault(step, {}).update(values)

    def headline(self, step: int, values: dict[str, float]) -> None: ...


class Evaluator:
    """An actor's handle: a call gives a future, which the test answers when it likes."""

    def __init__(self) -> None:
        self.calls: list[Future[Evaluation]] = []
        self.weights: list[Weights] = []
        self.run = SimpleNamespace(remote=self._asked)
        self.cancelled: list[Any] = []
        self.restarts = 0

    def _asked(self, weights: Weights, limit: int) -> Future[Evaluation]:
        self.weights.append(weights)
        self.calls.append(Future())
        return self.calls[-1]


@pytest.fixture
def evaluator(monkeypatch: pytest.MonkeyPatch) -> Evaluator:
    """Stands in for the actor and for the parts of Ray that are asked."""
    actor = Evaluator()

    def kill(_: Any, no_restart: bool) -> None:
        assert not no_restart
        actor.restarts += 1

    monkeypatch.setattr(module.ray, "get", lambda future: future.result())
    monkeypatch.setattr(module.ray, "cancel", actor.cancelled.append)
    monkeypatch.setattr(module.ray, "kill", kill)
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    return actor


@pytest.fixture
def evaluations(evaluator: Evaluator, tmp_path: Path) -> Evaluations:
    return evaluations_of(evaluator, tmp_path)


def evaluations_of(evaluator: Any, folder: Path) -> Evaluations:
    (folder / "checkpoints").mkdir(exist_ok=True)
    for step in range(0, STEPS + 1, 10):
        state.save(folder / "checkpoints", step, {"model": {"w": torch.ones(1)}}, {"step": step})
    config = SimpleNamespace(
        evaluate=SimpleNamespace(k=20, during_training=100), head=SimpleNamespace(prototypes=64)
    )
    plan = SimpleNamespace(config=config, steps=STEPS, warmup_steps=99, temperature_warmup_steps=0)
    return Evaluations(plan, evaluator, Tracker(), folder, EvaluatedOn())  # type: ignore[arg-type]


def within(seconds: float, call: Callable[[], None]) -> bool:
    """Whether a call ends at all: one that waits for the evaluator never would."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def ask(evaluations: Evaluations, *steps: int) -> None:
    for step in steps:
        evaluations.request(step, whole_weights(torch.nn.Linear(2, 2), keep=True))


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came")


def scored(value: float) -> Evaluation:
    return Evaluation({KNN: value}, decided_by=KNN)


def test_steps_go_on_and_the_run_ends_where_the_evaluator_hangs(
    evaluations: Evaluations,
    evaluator: Evaluator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "END_S", 0.1)
    assert within(30, lambda: ask(evaluations, 0, 10, 20, 30, STEPS))
    until(lambda: len(evaluator.calls) == 3)
    assert evaluations.pending_steps() == {0, 10, STEPS}  # the last one is not skipped
    rows = evaluations.tracker.rows
    assert rows == {20: {"eval/skipped": 1}, 30: {"eval/skipped": 2}}
    assert "the evaluation of step 20 is skipped (1 so far): that of step 0 has no" in caplog.text
    assert within(30, evaluations.finish)
    assert "no results of the evaluations of steps 0, 10, 40: the run is done" in caplog.text
    assert evaluations.said() == "evaluations: 2 skipped, 3 failed"
    assert evaluations.pending_steps() == set() and evaluations.choice.best is None
    assert len(evaluator.cancelled) == 3


def test_an_evaluator_that_hangs_is_started_again_and_keeps_no_checkpoints(
    evaluations: Evaluations, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(evaluations, 0, 10)
    until(lambda: len(evaluator.calls) == 2)
    evaluations.collect()
    assert evaluator.restarts == 0 and evaluations.pending_steps() == {0, 10}
    monkeypatch.setattr(module, "HANGING_S", 0.0)
    evaluations.collect()
    until(lambda: evaluator.restarts == 1)
    assert evaluations.pending_steps() == set() and evaluations.counts["failed"] == 2
    assert set(evaluator.cancelled) == set(evaluator.calls)  # or Ray would begin them again
    monkeypatch.setattr(module, "HANGING_S", 7200.0)
    ask(evaluations, 20)
    until(lambda: len(evaluator.calls) == 3)
    evaluator.calls[2].set_result(scored(0.5))
    evaluator.calls[0].set_result(scored(0.9))  # too late: nobody knows of it any more
    evaluations.wait(30)
    assert evaluations.best_summary == {"step": 20, "score": 0.5, "name": KNN}


def test_a_slow_evaluator_is_not_taken_for_one_that_hangs(
    evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now, sleep=lambda _: None, now=0.0)
    monkeypatch.setattr(module, "time", clock)
    evaluations.longest_s = 3600.0
    ask(evaluations, 0)
    clock.now = 9 * 3600.0
    evaluations.collect()
    assert evaluations.pending_steps() == {0}
    clock.now = 11 * 3600.0
    evaluations.collect()
    assert evaluations.pending_steps() == set()


def test_results_of_a_slow_evaluator_come_in_order(
    evaluations: Evaluations, evaluator: Evaluator
) -> None:
    ask(evaluations, 10, 20)
    until(lambda: len(evaluator.calls) == 2)
    evaluations.collect()
    assert evaluations.tracker.rows == {} and evaluations.pending_steps() == {10, 20}
    evaluator.calls[0].set_result(scored(0.7))
    until(lambda: evaluations.pending[0].answer is not None)
    ask(evaluations, 30)  # there is room again
    assert evaluations.pending_steps() == {20, 30} and not evaluations.counts
    until(lambda: len(evaluator.calls) == 3)
    evaluator.calls[1].set_result(scored(0.8))
    evaluator.calls[2].set_result(scored(0.75))
    assert within(30, evaluations.finish)
    assert {s: row[KNN] for s, row in evaluations.tracker.rows.items()} == {
        10: 0.7,
        20: 0.8,
        30: 0.75,
    }
    assert (
        evaluations.best_summary == {"step": 20, "score": 0.8, "name": KNN}
        and evaluations.said() == ""
    )
    assert evaluations.longest_s > 0


def test_an_evaluation_that_fails_is_said_and_the_next_one_is_tried(
    evaluations: Evaluations, evaluator: Evaluator, caplog: pytest.LogCaptureFixture
) -> None:
    ask(evaluations, 10, 20)
    until(lambda: len(evaluator.calls) == 2)
    evaluator.calls[0].set_exception(ValueError("Traceback\n  a line\nDataError: no image"))
    evaluator.calls[1].set_result(scored(0.5))
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert within(30, evaluations.finish)
    assert "the evaluation of step 10 failed: DataError: no image" in caplog.text
    assert evaluations.best_summary == {"step": 20, "score": 0.5, "name": KNN}
    assert evaluations.said() == "evaluations: 1 failed"


def test_weights_are_those_of_the_step(evaluations: Evaluations, evaluator: Evaluator) -> None:
    backbone = torch.nn.Linear(2, 2)
    before = backbone.weight.detach().clone()
    evaluations.request(10, whole_weights(backbone, keep=True))
    assert not whole_weights(backbone, keep=False)  # as the other ranks ask
    with torch.no_grad():
        backbone.weight.zero_()  # the next step's update
    until(lambda: len(evaluator.calls) == 1)
    assert torch.equal(torch.from_numpy(evaluator.weights[0]["weight"]), before)


def test_weights_are_sent_without_the_lock_that_steps_need(
    evaluations: Evaluations, evaluator: Evaluator
) -> None:
    """Pickled in the stream, they would hold Python's lock for seconds a GB; beside it, Ray copies
    them outside of Python.
    """
    evaluations.request(10, whole_weights(torch.nn.Linear(500, 500), keep=True))
    until(lambda: len(evaluator.calls) == 1)
    beside: list[pickle.PickleBuffer] = []
    stream = cloudpickle.dumps(evaluator.weights[0], 5, buffer_callback=beside.append)
    assert len(stream) < 2000
    assert sum(buffer.raw().nbytes for buffer in beside) == 4 * (500 * 500 + 500)


def test_who_stops_a_run_at_its_end_does_not_wait(evaluations: Evaluations) -> None:
    ask(evaluations, STEPS)
    assert within(30, lambda: evaluations.finish(stopped=lambda: True))
    assert evaluations.said() == "evaluations: 1 failed"


def test_a_best_of_another_score_is_chosen_anew(
    evaluator: Evaluator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = evaluations_of(evaluator, tmp_path)
    first._record(20, scored(0.9))
    again = evaluations_of(evaluator, tmp_path)
    other = Evaluation({KNN: 0.95, "eval/rank_me": 0.5}, decided_by="eval/rank_me")
    again._record(10, other)
    assert (
        "(step 20) was chosen by eval/knn20_top1: it is chosen anew by eval/rank_me" in caplog.text
    )
    assert again.best_summary == {"step": 10, "score": 0.5, "name": "eval/rank_me"}
    assert evaluations_of(evaluator, tmp_path).best_summary == again.best_summary


def test_the_best_knows_what_it_was_chosen_from(evaluator: Evaluator, tmp_path: Path) -> None:
    """Evaluations with a checkpoint, once each, whatever is repeated after a restart."""
    first = evaluations_of(evaluator, tmp_path)
    for step, value in ((0, 0.3), (10, 0.5), (15, 0.9), (20, 0.4)):  # 15 has no checkpoint
        first._record(step, scored(value))
    again = evaluations_of(evaluator, tmp_path)
    for step, value in ((20, 0.4), (30, 0.45)):
        again._record(step, scored(value))
    best = read_best(tmp_path / "checkpoints")
    assert best == Best(10, 0.5, KNN, evaluated=(0, 10, 20, 30))
    # by another score it is chosen from that on
    again._record(STEPS, Evaluation({"eval/rank_me": 3.0}, decided_by="eval/rank_me"))
    best = read_best(tmp_path / "checkpoints")
    assert best is not None and best.evaluated == (STEPS,)


def test_the_name_of_an_older_best_is_that_of_its_k_nn(
    evaluator: Evaluator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluations_of(evaluator, tmp_path)
    write_best(tmp_path / "checkpoints", Best(20, 0.9))  # as it was written before
    again = evaluations_of(evaluator, tmp_path)
    again._record(10, scored(0.8))
    assert again.best_summary == {"step": 20, "score": 0.9, "name": KNN} and not caplog.records
    assert again.choice.best is not None and again.choice.best.evaluated == (10, 20)


def test_labels_that_are_not_used_are_said_once(
    evaluations: Evaluations, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        evaluations._record(
            step,
            Evaluation({"eval/rank_me": 3.0}, {}, "", "labels are not used: one class"),
        )
    said = [r.getMessage() for r in caplog.records if "labels are not used" in r.getMessage()]
    assert said == ["evaluation: labels are not used: one class; no checkpoint is best"]
    assert evaluations.choice.best is None and state.best(evaluations.checkpoints) is None
    evaluations._record(
        20, Evaluation({"eval/rank_me": 3.0}, {}, "eval/rank_me", "labels are not used: two")
    )
    assert "labels are not used: two; rank_me chooses the best checkpoint" in caplog.text
    assert evaluations.best_summary == {"step": 20, "score": 3.0, "name": "eval/rank_me"}
