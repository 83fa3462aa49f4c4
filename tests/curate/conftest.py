"""A made-up curation for the tests of its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.curate.report.summary import Facts, Summary, summarise
from tests.curate.made_up import Run, calibration, write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """2,000 images with copies, leaks, flat ones, seeds and clusters."""
    return write_run(Path(tmp_path_factory.mktemp("made_up")))


@pytest.fixture(scope="session")
def summary(run: Run) -> Summary:
    """Of that run."""
    return summarised(run)


def summarised(run: Run, **others: Any) -> Summary:
    """With all that the run knows."""
    facts = Facts(
        steps=run.results,
        calibration=calibration(),
        evaluation_sets=run.sets,
        leaked=run.leaked,
        seed_sets=run.seed_sets,
    )
    return summarise(run.root, replace(facts, **others))
