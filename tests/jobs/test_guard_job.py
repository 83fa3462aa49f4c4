"""The guard in whole jobs: a destructive rate ends, keeps the start and says so; again, a kill in
between, and a rate that is right.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.jobs.conftest import ROOT, Job, runner
from tests.tiny import write_tiny

pytestmark = [pytest.mark.slow, pytest.mark.jobs, pytest.mark.timeout(1200)]
HIGH = ("optim.lr=5", "optim.clip=1000", "train.eval_every=5", "optim.steps=100")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits: 400 to train on, 300 to ask, 300 to keep."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for i, (pixels, label) in enumerate(zip(data.images[:1000], data.target, strict=False)):
        split = "train" if i < 400 else "test" if i < 700 else "keep"
        place = folder / split / f"digit{label}"
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15).astype(np.uint8)).resize((24, 24)).convert("RGB")
        image.save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def arguments(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    recipe = write_tiny(
        tmp_path_factory.mktemp("recipes") / "tiny.yaml",
        resources={"cpus": 2, "object_store_gb": 0.2},
    )
    return [
        str(recipe),
        f"data.source={digits}/train",
        f"evaluate.queries={digits}/test",
        "guard.enabled=true",
        "train.workers=1",
    ]


@pytest.fixture(scope="module")
def ended(
    arguments: list[str],
    digits: Path,
    cluster_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """(folder, console) of a chain with a destructive rate."""
    folder = tmp_path_factory.mktemp("ended")
    more = [f"run.folder={folder}", f"guard.keep={digits}/keep", *HIGH]
    shown = runner(cluster_environment)("run", *arguments, *more)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return folder / "tiny", shown.stdout


def test_a_destructive_rate_ends_and_the_start_is_kept(ended: tuple[Path, str]) -> None:
    run, console = ended
    done = json.loads((run / "pretrain" / "_done.json").read_text())["result"]
    assert done["status"] == "guarded" and done["step"] < 100
    assert done["best"]["step"] == 0 and "the weights it started from are kept" in done["guard"]
    assert done["guard"] in console and "ended by the guard after step" in done["text"]
    assert (run / "checkpoints" / "step-00000000").is_dir()
    card = json.loads((run / "evaluate" / "_done.json").read_text())["result"]
    assert card["step"] == 0 and "at step 0" in card["text"]
    assert json.loads((run / "export" / "_done.json").read_text())["result"]["step"] == 0
    assert done["guard"].partition(":")[0] in (run / "report.html").read_text()
    assert "keep_knn20_top1" in console and (run / "pack" / "keep").is_dir()


def test_the_same_command_says_it_again_and_trains_no_further(
    ended: tuple[Path, str], arguments: list[str], digits: Path, without_ray: Job, tmp_path: Path
) -> None:
    run = shutil.copytree(ended[0], tmp_path / "tiny")
    same = [f"run.folder={tmp_path}", f"guard.keep={digits}/keep", *HIGH]
    shown = without_ray("pretrain", *arguments, *same)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "ended by the guard after step" in shown.stdout and "lower optim.lr" in shown.stdout
    assert json.loads((run / "checkpoints" / "guard.json").read_text())["ended"]


def test_without_its_mark_the_end_is_still_known(
    ended: tuple[Path, str],
    arguments: list[str],
    digits: Path,
    cluster_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    run = shutil.copytree(ended[0], tmp_path / "tiny")
    (run / "pretrain" / "_done.json").unlink()  # a kill between the end and the mark
    steps = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    same = [f"run.folder={tmp_path}", f"guard.keep={digits}/keep", *HIGH]
    shown = runner(cluster_environment)("pretrain", *arguments, *same)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "ended by the guard after step" in shown.stdout and "\nstep " not in shown.stdout
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == steps


def test_a_rate_that_is_right_is_left_alone(
    arguments: list[str], cluster_environment: dict[str, str], tmp_path: Path
) -> None:
    more = [f"run.folder={tmp_path}", "optim.lr=1e-4", "train.eval_every=10"]
    shown = runner(cluster_environment)("pretrain", *arguments, *more)
    if "not packed yet" in shown.stdout + shown.stderr:
        runner(cluster_environment)("pack", *arguments, *more)
        shown = runner(cluster_environment)("pretrain", *arguments, *more)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    done = json.loads((tmp_path / "tiny" / "pretrain" / "_done.json").read_text())["result"]
    assert done["status"] == "finished" and "guard" not in done


def test_a_kill_in_between_keeps_the_start_and_the_count(
    arguments: list[str], cluster_environment: dict[str, str], tmp_path: Path
) -> None:
    more = [f"run.folder={tmp_path}", *HIGH, "guard.falls=4"]
    assert runner(cluster_environment)("pack", *arguments, *more).returncode == 0
    command = [sys.executable, ROOT / "jobs" / "pretrain.py", *arguments, *more]
    job = subprocess.Popen(
        [*map(str, command)], env=cluster_environment, cwd=ROOT, stdout=subprocess.DEVNULL
    )
    state = tmp_path / "tiny" / "checkpoints" / "guard.json"
    while not state.exists() and job.poll() is None:
        time.sleep(0.1)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert json.loads(state.read_text())["rows"]["score"]
    start = (tmp_path / "tiny" / "checkpoints" / "start.npz").stat().st_mtime_ns
    shown = runner(cluster_environment)("pretrain", *arguments, *more)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "ended by the guard after step" in shown.stdout
    assert (tmp_path / "tiny" / "checkpoints" / "start.npz").stat().st_mtime_ns == start


def test_a_keep_set_without_labels_and_a_wrong_path_are_said_before_anything_runs(
    arguments: list[str], digits: Path, without_ray: Job, tmp_path: Path
) -> None:
    shown = without_ray("run", *arguments, f"run.folder={tmp_path}", "guard.keep=nowhere/")
    assert shown.returncode != 0 and "guard.keep" in shown.stderr + shown.stdout
    one = f"guard.keep={digits}/keep/digit1"
    shown = without_ray("run", *arguments, f"run.folder={tmp_path}", one)
    assert shown.returncode != 0 and "guard.keep" in shown.stderr + shown.stdout
