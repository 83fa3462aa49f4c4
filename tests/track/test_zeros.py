"""Flat zeros stay out of MLflow, and nothing else does: against a reference of ten lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.track import TrackSettings, open_pipeline, sender
from pipeline.track.journal import FILE_NAME, Journal
from pipeline.track.mlflow_writer import Writer, units
from pipeline.track.pages.zeros import Zeros, points_of
from pipeline.track.sender import sync
from pipeline.track.state import State

NAMES = [f"health/m{i}" for i in range(6)]


def expected(rows: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """What MLflow ends with: the rows less the leading exact zeros, but for the last of these."""
    first = next((i for i, (_, value) in enumerate(rows) if value != 0), None)
    return [] if first is None else rows[max(0, first - 1) :]


def values(seed: int, steps: int) -> dict[str, list[float]]:
    """Metrics that are 0 for a while, for ever, never, and 0 again; one of them not finite."""
    rng = np.random.default_rng(seed)
    series = {}
    for number, name in enumerate(NAMES):
        first = [0, 1, steps, *rng.integers(0, steps + 1, 3)][number]
        after = rng.choice([0.0, -0.0, 1.5, -2.0], steps)
        after[:1] = 1e-300  # surely not 0
        series[name] = [0.0] * int(first) + [float(value) for value in after]
    series[NAMES[4]][int(rng.integers(0, steps))] = float("inf")
    return {name: row[:steps] for name, row in series.items()}


class Server:
    """Stands for MLflow's client: takes batches, sometimes fails after it has taken one."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.points: set[tuple[str, str, int, str, int]] = set()

    def log_batch(self, run_id: str, metrics: Any, synchronous: bool = True) -> None:
        for one in metrics:
            self.points.add((run_id, one.key, one.step, repr(one.value), one.timestamp))
        if self.rng.random() < 0.3:
            raise ConnectionError("the answer was lost")

    def curve(self, run: str, name: str) -> list[tuple[int, float]]:
        return sorted((p[2], float(p[3])) for p in self.points if p[:2] == (run, name))


class Known:
    def id(self, run: str) -> str:
        return run

    def again(self, run: str, error: Exception) -> bool:
        return False


def send(folder: Path, server: Server, limit: int | None = None) -> None:
    """One process: sends from where track.json says, up to so many calls, then is killed."""
    state = State(folder, "key")
    known = state.known("server")
    writer = Writer.__new__(Writer)
    writer.client, writer.runs, writer.known = server, Known(), known  # type: ignore[assignment]
    writer.folder, writer._said = folder, set()
    for count, (batch, end) in enumerate(units(folder / FILE_NAME, known.sent)):
        if limit is not None and count >= limit:
            return
        while True:
            try:
                writer.apply([event for event in batch if "metrics" in event], end)
                break
            except ConnectionError:
                continue
        known.sent = end
        if server.rng.random() < 0.8:  # else it dies before it has written that down
            state.save()


@pytest.mark.parametrize("seed", range(20))
def test_the_server_has_the_journal_less_its_leading_zeros(tmp_path: Path, seed: int) -> None:
    journal, server = Journal(tmp_path / FILE_NAME), Server(seed)
    rng, steps = np.random.default_rng(seed), 40
    series = values(seed, steps)
    for step in range(steps):
        row = {name: series[name][step] for name in NAMES}
        journal.metrics("pretrain", step, row)
        journal.metrics("pretrain", step, {NAMES[3]: row[NAMES[3]]}, to="pipeline")
        if rng.random() < 0.3:
            journal.append("pretrain", tags={"a": "b"})  # cuts the calls
        if rng.random() < 0.2:
            send(tmp_path, server, int(rng.integers(0, 4)))
    send(tmp_path, server)
    journal.close()
    for name in NAMES:
        finite = [float("nan") if np.isinf(v) else v for v in series[name]]
        want = expected(list(enumerate(finite)))
        assert repr(server.curve("pretrain", name)) == repr(want)
    want = expected(list(enumerate(series[NAMES[3]])))
    assert server.curve("pipeline", NAMES[3]) == want
    assert journal_rows(tmp_path) == steps  # the journal has every one of them


def journal_rows(folder: Path) -> int:
    lines = map(json.loads, (folder / FILE_NAME).read_text().splitlines())
    return sum(set(NAMES) == set(line.get("metrics", {})) for line in lines)


def test_a_resume_takes_back_zeros_that_were_held(tmp_path: Path) -> None:
    journal, server = Journal(tmp_path / FILE_NAME), Server(1)
    for step in range(10):
        journal.metrics("pretrain", step, {"data/bad_images": 0, "loss/total": step})
        journal.metrics("pretrain", step, {"data/bad_images": 0}, to="pipeline")
    send(tmp_path, server)
    journal.resume("pretrain", 6)
    send(tmp_path, server)
    journal.metrics("pretrain", 6, {"data/bad_images": 2})
    journal.metrics("pretrain", 6, {"data/bad_images": 2}, to="pipeline")
    send(tmp_path, server)
    journal.close()
    # 9 was the last zero, but the run went on from 6
    assert server.curve("pretrain", "data/bad_images") == [(5, 0.0), (6, 2.0)]
    assert server.curve("pipeline", "data/bad_images") == [(5, 0.0), (6, 2.0)]
    assert server.curve("pretrain", "loss/total")[-1] == (9, 9.0)  # MLflow takes nothing back


def test_a_value_that_is_not_finite_is_no_zero() -> None:
    zeros = Zeros()
    rows = [{"run": "r", "ts": 1, "step": 0, "metrics": {"a": 0.0}}]
    assert points_of(zeros, rows) == [] and zeros.held == {"a": [1, 0, "r"]}
    rows = [{"run": "r", "ts": 2, "step": 1, "metrics": {"a": None}}]
    assert points_of(zeros, rows) == [("a", 0.0, 1, 0), ("a", None, 2, 1)]
    assert zeros.held == {} and zeros.begun == ["a"]


def test_with_a_server_and_a_restart_between(
    tmp_path: Path, mlflow_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "INTERVAL_S", 0.05)
    folder, steps = tmp_path / "zeros", 12
    series = values(3, steps)
    settings = TrackSettings(str(folder), "", "tests", mlflow_server.uri)
    for part in (range(5), range(5, steps)):
        with open_pipeline(settings, "zeros") as pipeline:
            tracker = pipeline.stage("pretrain")
            for step in part:
                tracker.metrics(step, {name: series[name][step] for name in NAMES})
            if part.start:
                tracker.headline(steps, {"eval/knn20_top1": 0.5})
    run = mlflow_server.runs("tests", "zeros")["pretrain"]
    for name in NAMES:
        want = [(s, float("nan") if np.isinf(v) else v) for s, v in enumerate(series[name])]
        got = mlflow_server.points(run.info.run_id, name)
        assert np.array_equal(np.array(got), np.array(expected(want)), equal_nan=True) or (
            got == expected(want) == []
        )
    assert NAMES[2] not in run.data.metrics  # always 0
    before = {name: mlflow_server.points(run.info.run_id, name) for name in NAMES}
    sync(folder, mlflow_server.uri, again=True)  # all of it once more: nothing doubles
    after = {name: mlflow_server.points(run.info.run_id, name) for name in NAMES}
    assert repr(before) == repr(after)
