"""Where the evaluator of a run is put, and which of its scores are compared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.train import state
from pipeline.train.evaluations import Evaluations, roomiest

KNN = "eval/knn20_top1"


def node(name: str, cpus: float | None, alive: bool = True) -> dict[str, Any]:
    resources = {"memory": 1e9} | ({} if cpus is None else {"CPU": cpus})
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def test_the_living_node_with_the_most_cpus() -> None:
    head = node("head", None)
    assert roomiest([head, node("a", 2), node("b", 8), node("gone", 64, alive=False)]) == "b"
    assert roomiest([head, node("bare", 0)]) == ""  # Ray may choose
    assert roomiest([]) == ""


def test_the_best_is_begun_anew_where_other_images_are_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (10, 20):
        state.save(folder, step, {"model": {"w": torch.ones(1)}}, {"step": step})
    settings = SimpleNamespace(config=SimpleNamespace(evaluate=SimpleNamespace(k=20)))

    def evaluations(compared: str) -> Evaluations:
        return Evaluations(settings, None, None, tmp_path, compared)  # type: ignore[arg-type]

    first = evaluations("a")
    first._note_best(10, 0.9, KNN)
    again = evaluations("a")
    assert again.best == {"step": 10, "score": 0.9, "name": KNN} and not caplog.records
    again._note_best(20, 0.5, KNN)
    best = state.best(folder)
    assert best and (best[0].step, best[1]) == (10, 0.9)
    other = evaluations("b")
    assert other.best is None
    assert "(step 10, score 0.9000) was evaluated with other images or settings" in caplog.text
    best = state.best(folder)  # until another is known
    assert best and best[0].step == 10
    other._note_best(20, 0.5, KNN)
    best = state.best(folder)
    assert best and (best[0].step, best[1]) == (20, 0.5)
    assert evaluations("b").best == {"step": 20, "score": 0.5, "name": KNN}
