"""Two rounds as one command, killed in the second training and started again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs.conftest import ROOT, runner
from tests.jobs.test_resume import arguments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def stamps(folder: Path) -> dict[Path, int]:
    return {
        p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"
    }


def test_a_killed_job_goes_on_in_the_round_that_it_was_in(
    images: Path, recipe: Path, cluster_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [*arguments(images, recipe, tmp_path), "curate.preset=balanced", "balance.images=40"]
    command += ["quality.min_side=8", "dedup.threshold=0.97", "balance.resampling=1", "rounds=2"]
    run = tmp_path / "tiny"
    first = subprocess.Popen(
        [sys.executable, ROOT / "jobs" / "run.py", *command],
        env=cluster_environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list((run / "checkpoints").glob("step-*")):  # of the second round
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    before = stamps(run / "round-1")
    assert before[run / "round-1" / "_done.json"]

    again = runner(cluster_environment)("run", *command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert re.search(r"^round-1 +up to date", again.stdout, re.M)
    assert re.search(r"^curate +up to date", again.stdout, re.M)
    assert re.search(
        r"^rounds +k-NN \d.\d+ after round 1, \d.\d+ after round 2 ", again.stdout, re.M
    )
    assert stamps(run / "round-1") == before

    done = {
        name: json.loads((run / name / "_done.json").read_text())["result"]
        for name in ("pack", "round-1", "round-1/curate", "curate", "pretrain", "rounds")
    }
    assert done["round-1/curate"]["reasons"]["kept"] == done["pack"]["train"]["images"] == 80
    assert done["curate"]["reasons"] == {"kept": 40, "balanced_out": 40}
    assert set(done["rounds"]["scores"]) == {
        "rounds/knn20_top1_round_1", "rounds/knn20_top1_round_2",
    }  # fmt: skip
    for place, name in ((run / "round-1", "round-1/curate"), (run, "curate")):
        assert done[name]["digest"] in (place / "plan.yaml").read_text()
    assert (run / "rounds" / "card.html").is_file()

    finished = runner(cluster_environment)("run", *command)
    assert [line.split()[0] for line in finished.stdout.splitlines()] == [
        "run", "pack", "round-1", "curate", "pretrain", "evaluate", "rounds", "export", "verdict",
    ]  # fmt: skip
    for changed, said in (
        ("optim.lr=0.1", "optim.lr: "),
        ("curate.rounds=3", "was trained with curate.rounds=2"),
    ):
        refused = runner(cluster_environment)("run", *command, changed)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_dry_run_shows_all_rounds_with_their_time(
    images: Path, recipe: Path, without_ray: object, tmp_path: Path
) -> None:
    command = [*arguments(images, recipe, tmp_path), "curate.preset=balanced", "balance.images=40"]
    shown = without_ray("run", *command, "rounds=2", "curate.rounds_init=previous", "--dry-run")  # type: ignore[operator]
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^round 1 +of 2: copies and junk go", shown.stdout, re.M)
    assert re.search(
        r"^ +trains 40 steps of 16 images, about .* from random weights", shown.stdout, re.M
    )
    assert re.search(r"^round 2 +of 2: images chosen by the network of round 1", shown.stdout, re.M)
    assert "from the weights of round 1" in shown.stdout
    assert re.search(r"^rounds +2 trainings, about .* together", shown.stdout, re.M)
    assert not list(tmp_path.iterdir())
