"""The curate stage as a job on Ray: in the chain, and with killed workers and a killed driver."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import job
from pipeline.curate.steps import tasks as steps
from pipeline.driver import cluster
from pipeline.storage.run_folder import RunFolder
from tests.curate.piles import dies_once, hub
from tests.jobs.conftest import ROOT, runner
from tests.jobs.test_curate import FIXED, assert_balanced, blobs, encoded, files_of, wild
from tests.jobs.test_resume import arguments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = ("curate", "steps", "decisions")


def sets(folder: Path) -> list[str]:
    """Arguments of a curation that uses every step."""
    images = wild()
    if not (folder / "hub").exists():
        hub(folder / "hub", [images[:15], images[15:40], images[40:]])
        hub(folder / "test", [[encoded(blobs(3))]])
        hub(folder / "seeds", [[encoded(blobs(i).rotate(5)) for i in range(6)]])
    return [
        f"run.folder={folder}",
        "track.enabled=false",
        "curate.preset=dedup",
        *FIXED,
        "dedup.threshold=auto",
        "dedup.calibration_images=25",
        f"data.shards={folder}/hub",
        f"leaks.sets.test={folder}/test",
        "leaks.scope=components",
        f"retrieve.seeds.mine={folder}/seeds",
        "retrieve.mode=sample",
        "balance.images=9",
        "curate.embedder=descriptor",
        "balance.resampling=1",
        "data.shard_mb=0.01",
    ]


def test_a_worker_is_killed_in_each_step(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    import ray

    monkeypatch.setattr(cluster, "joined", lambda _: contextlib.nullcontext())
    given = sets(tmp_path)
    job.main(["curate"], "doc", [*given, "run.name=whole"])
    whole = RunFolder.of(str(tmp_path), "whole")
    assert_balanced(whole, len(wild()) + 6)
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(steps, "_task", dies_once)
    real = ray.remote

    def remote(function):  # type: ignore[no-untyped-def]
        made = real(function)
        options = made.options

        def with_marks(**given):  # type: ignore[no-untyped-def]
            given["runtime_env"]["env_vars"]["CURATE_MARKS"] = str(marks)
            return options(**given)

        made.options = with_marks
        return made

    monkeypatch.setattr(ray, "remote", remote)
    job.main(["curate"], "doc", [*given, "run.name=killed"])
    killed = RunFolder.of(str(tmp_path), "killed")
    assert len(list(marks.iterdir())) > 25  # one for each step
    assert files_of(killed, *STEPS) == files_of(whole, *STEPS)
    assert files_of(killed, "curated") == files_of(whole, "curated")


LAUNCHER = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pipeline.curate.steps import tasks as steps
inner, seen = steps._run, []
def killed(*given):
    for found in inner(*given):
        seen.append(found)
        if len(seen) == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield found
steps._run = killed
from pipeline.job import main
main(["curate"], "doc", sys.argv[1:])
"""


def test_the_driver_is_killed(cluster_environment: dict[str, str], tmp_path: Path) -> None:
    given = sets(tmp_path)
    run = runner(cluster_environment)
    shown = run("curate", *given, "run.name=whole")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    whole = RunFolder.of(str(tmp_path), "whole")
    kept: dict[Path, int] = {}
    root = tmp_path / "killed"
    for after in (4, 9, 15, 24):
        script = tmp_path / f"launch{after}.py"
        script.write_text(LAUNCHER.format(root=str(ROOT), after=after))
        ended = subprocess.run(
            [sys.executable, str(script), *given, "run.name=killed"],
            env=cluster_environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        again = {p for p, stamp in kept.items() if not p.exists() or p.stat().st_mtime_ns != stamp}
        assert len(again) <= 0.05 * len(kept), again
        kept = {p: p.stat().st_mtime_ns for p in root.rglob("_tasks/*.json")}
    shown = run("curate", *given, "run.name=killed")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "Traceback" not in shown.stdout + shown.stderr
    again = {p for p, stamp in kept.items() if not p.exists() or p.stat().st_mtime_ns != stamp}
    assert len(again) <= 0.05 * len(kept)
    killed = RunFolder.of(str(tmp_path), "killed")
    assert files_of(killed, *STEPS) == files_of(whole, *STEPS)
    assert files_of(killed, "curated") == files_of(whole, "curated")


def test_the_chain_trains_on_what_is_kept_and_the_backbone_curates(
    images: Path, recipe: Path, cluster_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [*arguments(images, recipe, tmp_path), "curate.preset=dedup", "optim.steps=6"]
    command += ["quality.min_side=8", "dedup.threshold=0.97"]
    shown = runner(cluster_environment)("run", *command)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    run = tmp_path / "tiny"
    done = {
        stage: json.loads((run / stage / "_done.json").read_text())["result"]
        for stage in ("pack", "curate", "pretrain", "evaluate", "export")
    }
    assert done["curate"]["images_in"] == done["pack"]["train"]["images"] == 80
    plan = (run / "plan.yaml").read_text()
    assert done["curate"]["digest"] in plan
    assert "curate" in (run / "report.html").read_text()
    again = runner(cluster_environment)("run", *command)
    assert again.returncode == 0
    assert all(f"{stage:<11} up to date" in again.stdout for stage in done)
    # the loop is closed: the backbone just trained says what images show
    more = [f"curate.embedder={run}", "balance.images=20", "run.name=again"]
    place = [f"data.shards={run}/shards", f"run.folder={tmp_path}", "evaluate.queries="]
    given = [str(recipe), *place, *command[-3:], "curate.preset=dedup", *more]
    shown = runner(cluster_environment)("curate", *given)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    table = pq.read_table(tmp_path / "again" / "curate" / "steps" / "decisions" / "00000.parquet")
    counts = Counter(table.column("reason").to_pylist())
    assert counts["kept"] == 20 and counts["balanced_out"] > 40
