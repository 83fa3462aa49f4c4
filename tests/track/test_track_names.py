"""Names and lengths against MLflow's own validators."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.track.names import cut, metric_name, numbers, picture_key


@pytest.mark.long
@settings(deadline=None, max_examples=200)
@given(st.text(max_size=400))
@example("eval/knn@20 [top1]")
@example("../../etc/passwd")
@example("a//b/./c/")
@example("/")
@example("")
def test_mlflow_accepts_every_name(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    _validate_metric_name(metric_name(name))
    _validate_param_name(metric_name(name))
    key = picture_key(name)
    assert key.startswith("pictures/") and len(key) <= 250 and ":" not in key


@pytest.mark.parametrize("name", ["loss/total", "eval/knn20_top1", "perf/gpu_memory_gib"])
def test_names_of_the_contract_stay_as_they_are(name: str) -> None:
    assert metric_name(name) == name


def test_a_cut_is_visible_and_fits() -> None:
    assert cut("short", 100) == "short"
    text = cut("x" * 7000, 6000)
    assert len(text) == 6000 and text.endswith("[cut, 7,000 characters]")


def test_values() -> None:
    import numpy as np

    assert numbers({"x": -math.inf, "y": math.nan}) == ({"x": None, "y": None}, [])
    assert numbers({"a": np.float32(0.5), "b": True, "c": [1, 2]}) == ({"a": 0.5, "b": 1.0}, ["c"])
