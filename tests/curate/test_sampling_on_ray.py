"""Balance and retrieval through Ray give what they give in one process, and go on after an end."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from planted_vectors import ids_of_numbers, separated, written

from pipeline.curate.choose import hierarchy
from pipeline.curate.choose.balance import Sample, balanced_sample
from pipeline.curate.choose.hierarchy import Levels
from pipeline.curate.choose.retrieve import retrieve
from pipeline.curate.choose.seed_clusters import Retrieval
from pipeline.curate.rows.tables import read_table
from pipeline.curate.steps.steps import Steps
from tests.standins import run_here


def everything(folder: Path, files: int):
    vectors, _ = separated(160, 8)
    ids = ids_of_numbers(range(160))
    rows = written(folder, ids[:140], vectors[:140], files)
    seeds = {"s": written(folder, ids[140:], vectors[140:], name="s")}
    steps = Steps(folder)
    built = hierarchy.build(steps.below("levels"), rows, Levels((12, 4), 3, 2, 1))
    balanced = balanced_sample(steps.below("balanced"), rows, built, Sample(30, 3, 1, 2))
    got = retrieve(steps.below("retrieved"), rows, seeds, Retrieval("sample"), 3)
    assert all(step.peak_bytes > 0 for step in steps.done)
    tables = [
        read_table(step.folder, name).to_pylist()
        for step in (balanced.result, got.result)
        for name in rows.names
    ]
    return tables, balanced, got


def test_same_on_ray_and_again_after_files_are_lost(tmp_path: Path, ray_cluster, monkeypatch):
    tables, balanced, got = everything(tmp_path / "ray", 2)
    assert balanced.result.reused == 0
    again, balanced_again, got_again = everything(tmp_path / "ray", 2)
    assert again == tables and balanced_again.result.reused == got_again.result.reused == 2
    shutil.rmtree(tmp_path / "ray" / "balanced")
    assert everything(tmp_path / "ray", 2)[0] == tables
    run_here(monkeypatch)
    here, balanced_here, got_here = everything(tmp_path / "here", 2)
    assert here == tables
    assert balanced_here.summary == balanced.summary and got_here.summary == got.summary
    one_file, _, _ = everything(tmp_path / "one", 1)
    assert np.concatenate(tables[:2]).tolist() == one_file[0]
