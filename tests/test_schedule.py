"""Schedules against the reference's sampled values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.schedule import cosine, linear

GOLDEN = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())
EPOCH = 1250  # steps of one of the reference's epochs
WEIGHT_DECAY_END = {"vitl16_short_32gpu": 0.4, "vitl14_96gpu": 0.2, "vitg14_256gpu": 0.2}
MOMENTUM = {"vitl16_short_32gpu": 0.992, "vitl14_96gpu": 0.994, "vitg14_256gpu": 0.994}


@pytest.mark.parametrize("name", sorted(WEIGHT_DECAY_END))
def test_published_recipes(name: str) -> None:
    golden = GOLDEN[name]
    steps, lr = golden["total_iters"], golden["lr"]
    for i, step in enumerate(golden["its"]):
        rate = cosine(step, lr, 1e-6, steps, golden["warmup_iters"])
        found = {
            "lr": rate,
            "wd": cosine(step, 0.04, WEIGHT_DECAY_END[name], steps),
            "momentum": cosine(step, MOMENTUM[name], 1.0, steps),
            "teacher_temp": linear(step, 0.04, 0.07, golden["teacher_temp_warmup_iters"]),
            "last_layer_lr": 0.0 if step < EPOCH else rate,
        }
        for key, value in found.items():
            assert value == pytest.approx(golden["values"][key][i], rel=1e-12, abs=1e-15), key


def test_every_step_of_a_short_run() -> None:
    golden, cfg = GOLDEN["tiny_full"], GOLDEN["tiny_full"]["cfg"]
    epoch = cfg["epoch_length"]
    steps = epoch * cfg["epochs"]
    values = golden["values"]
    for step in range(len(values["lr"])):
        lr = cosine(step, cfg["lr"], cfg["min_lr"], steps, cfg["warmup_epochs"] * epoch)
        assert lr == pytest.approx(values["lr"][step], rel=1e-12)
        assert cosine(step, *cfg["wd"], steps) == pytest.approx(values["wd"][step], rel=1e-12)
        momentum = cosine(step, *cfg["momentum"], steps)
        assert momentum == pytest.approx(values["momentum"][step], rel=1e-12)
        warm = linear(step, *cfg["teacher_temp"], cfg["warmup_teacher_temp_epochs"] * epoch)
        assert warm == pytest.approx(values["teacher_temp"][step], rel=1e-12)


def test_freeze_and_warm_up_together() -> None:
    golden = GOLDEN["cosine_with_freeze"]
    kw = golden["kwargs"]
    found = [
        cosine(
            step,
            kw["base_value"],
            kw["final_value"],
            kw["total_iters"],
            kw["warmup_iters"],
            kw["start_warmup_value"],
            kw["freeze_iters"],
        )
        for step in range(len(golden["values"]))
    ]
    np.testing.assert_allclose(found, golden["values"], rtol=1e-12)


def test_edges() -> None:
    assert cosine(0, 1.0, 0.1, 5, warmup=1, start=0.2) == 0.2  # np.linspace(0.2, 1, 1) is [0.2]
    assert cosine(3, 1.0, 0.1, 3, warmup=3) == 0.1
    assert cosine(2, 1.0, 0.1, 3, warmup=3) == 1.0
    assert linear(0, 0.04, 0.07, 0) == 0.07  # no warm-up
    assert linear(0, 0.04, 0.07, 1) == 0.04
    assert linear(1, 0.04, 0.07, 1) == 0.07


def test_importing_schedule_is_light() -> None:
    code = "import sys, pipeline.schedule; assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
