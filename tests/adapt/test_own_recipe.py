"""jobs/adapt.py with a recipe of one's own, up to the config that its stages get."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from pipeline import job
from pipeline.config.config import Config

JOB = Path(__file__).resolve().parents[2] / "jobs" / "adapt.py"


@pytest.mark.parametrize("text", ["optim: {steps: 7}", "adapt: {card: false}"])
def test_a_recipe_that_says_nothing_of_adaptation_is_adapted_all_the_same(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    started: list[Config] = []
    monkeypatch.setattr(job, "_start", lambda config, stages, dry: started.append(config))
    for more in ([], ["adapt.enabled=false"]):
        monkeypatch.setattr(sys, "argv", ["adapt.py", f"{tmp_path}/mine.yaml", "w", "p/", *more])
        runpy.run_path(str(JOB), run_name="__main__")
    adapted, plain = started
    assert adapted.adapt.enabled and not plain.adapt.enabled
    assert (adapted.model.init, adapted.data.source) == ("w", "p/")
    assert adapted.run.name == "mine"
