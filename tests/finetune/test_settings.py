"""Rates by step, lengths, and what may not change when a run goes on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.errors import ConfigError, PlacementError
from pipeline.finetune.run import check_resume, layout_of, precision_of
from pipeline.finetune.settings import steps_of, steps_per_epoch
from pipeline.plan.layout import Machine
from pipeline.train.checkpoint import state
from tests.finetune.small import SETTINGS, settings


def test_rates_rise_and_fall_and_no_step_is_lost_at_0() -> None:
    given = settings(steps=10, warmup=0.3, lr=2.0)
    found = [given.at(step).lr for step in range(10)]
    expected = [2 * (step + 1) / 3 for step in range(3)]
    expected += [1 + math.cos(math.pi * step / 7) for step in range(7)]
    assert found == pytest.approx(expected)
    assert min(found) > 0 and given.at(4).last_layer_lr == found[4]
    assert settings(steps=3, warmup=0.0, lr=1.0).at(0).lr == 1.0


def test_lengths() -> None:
    assert steps_per_epoch(1000, 128) == 7
    assert steps_per_epoch(50, 128) == 1
    assert steps_of(None, None, 1000, 128) == 140
    assert steps_of(2.5, None, 1000, 128) == 18
    assert steps_of(None, 33, 1000, 128) == 33
    assert steps_of(0.01, None, 1000, 128) == 1


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path: Path) -> None:
    assert check_resume(SETTINGS, tmp_path / "none") is None
    meta = {"settings": json.loads(json.dumps(asdict(SETTINGS)))}
    state.save(tmp_path, 2, {}, meta)
    saved = check_resume(replace(SETTINGS, model="moved"), tmp_path)
    assert saved is not None and saved.step == 2
    for change, said in (
        ({"lr": 1.0}, "finetune.lr: 0.01 -> 1.0"),
        ({"images": "x"}, "the labelled images to train on:  -> x"),
        ({"digest": "x"}, "the weights of the model:  -> x"),
        ({"mean": (0.1, 0.2, 0.3)}, "augment.mean: [0.5, 0.5, 0.5] -> [0.1, 0.2, 0.3]"),
    ):
        with pytest.raises(ConfigError) as error:
            check_resume(replace(SETTINGS, **change), tmp_path)
        assert error.value.what.splitlines()[1:] == [f"    {said}"]


def test_workers_by_the_machine() -> None:
    def workers(machine: Machine, *fields: str, batch: int = 128) -> tuple[int, str, int]:
        layout = layout_of(load(list(fields)), machine, batch)
        return layout.workers, layout.device, layout.threads

    small = Machine(cpus=2, gpus=0, bfloat16=False)
    large = Machine(cpus=32, gpus=4, bfloat16=True)
    assert workers(small) == (1, "cpu", 2)
    assert workers(small, "train.workers=2") == (2, "cpu", 1)
    assert workers(large) == (4, "cuda", 8)
    assert workers(large, "train.device=cpu") == (8, "cpu", 4)
    assert workers(large, "train.workers=[2,3]") == (3, "cuda", 10)
    assert workers(large, batch=2) == (2, "cuda", 16)
    assert workers(large, "resources.threads=5")[2] == 5
    for fields in (["train.workers=9"], ["train.device=cuda"]):
        with pytest.raises(PlacementError, match="worker"):
            workers(small, *fields)
    assert precision_of(load([]), small, "cpu") == "float32"
    assert precision_of(load([]), large, "cpu") == precision_of(load([]), small, "cuda")
    assert precision_of(load(["finetune.precision=float32"]), large, "cuda") == "float32"
