"""A folder with `train/` and `val/` that is taken as one set: that is said, with what to set."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.stages.checks.parts import parts_of, taken_together


def test_parts_by_their_names() -> None:
    assert parts_of(["Val", "train", "cats", "test"]) == (["train"], ["Val", "test"])


@pytest.mark.parametrize("field", ["data.source", "evaluate.reference"])
def test_what_is_taken_together_is_said(field: str, tmp_path: Path) -> None:
    home = tmp_path / "photos"
    for name in ("train", "val"):
        (home / name).mkdir(parents=True)
    (said,) = taken_together(load([f"{field}={home}"]))
    assert "train, val are taken together, as one set" in said
    assert taken_together(load([f"{field}={home}", "data.labels=none"])) == []
    assert f"set {field}={home}/train evaluate.queries={home}/val" in said
    assert taken_together(load([f"{field}={home}/train"])) == []
    assert taken_together(load([f"{field}={home}/train", f"evaluate.queries={home}/val"])) == []
    assert taken_together(load([f"{field}={','.join(['shard-000.tar'] * 30)}"])) == []
    (home / "val").rmdir()  # a class of trains
    (home / "planes").mkdir()
    assert taken_together(load([f"{field}={home}"])) == []
