"""The doctor: its arithmetic on planted times, and the whole of it on shards of seconds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline import job
from pipeline.config.load import load
from pipeline.doctor import checkup, doctor, surroundings
from pipeline.doctor.doctor import Memory, Needs
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from tests.data import encoded, noise, stored
from tests.jobs.conftest import Job

LINES = [
    "run",
    "doctor",
    "machine",
    "disk",
    "gpus",
    "shards",
    "images",
    "bad",
    "read",
    "decode",
    "cut",
]
LINES += ["draws", "whole", "scaled", "rate", "cpus", "memory", "store"]


@pytest.mark.parametrize(
    ("whole_ms", "tasks", "rate", "cpus"),
    [(4.0, 1, 210, 4.762), (4.0, 64, 13_440, 4.762), (0.5, 2, 3360, 0.595), (100, 10, 84, 119.0)],
)
def test_the_prediction(whole_ms: float, tasks: int, rate: float, cpus: float) -> None:
    """4 ms are 250 images/s of a core, of which Ray leaves 0.84 (benchmarks/loader.py): 210."""
    needs = Needs.of(whole_ms, tasks)
    assert needs.images_per_s == pytest.approx(rate)
    assert needs.cpus_per_1000 == pytest.approx(cpus, rel=1e-3)


def plan_of(*overrides: str, cpus: int = 64, gpus: int = 8) -> Plan:
    config = load(["optim.steps=1", *overrides])
    machine = Machine(cpus=cpus, gpus=gpus, bfloat16=True)
    return resolve(config, SetFacts(100000, ""), machine=machine)


def test_the_memory() -> None:
    """Against the same sum by hand: ten crops of an image are 531,888 bytes."""
    plan = plan_of()
    image = 3 * (2 * 224**2 + 8 * 98**2)
    assert image == 531_552
    spec = type("Spec", (), {"portion_images": plan.chunk_images})()
    memory = Memory.of(plan, spec, 110_000, 1024)
    assert (plan.chunk_images, plan.workers, plan.decode_tasks) == (128, 8, 57)
    assert memory.chunk == 128 * image
    assert memory.portion_crops == 128 * image
    assert memory.portion_encoded == 128 * 110_000
    assert memory.window == 1024 * 110_000
    readers = 3 * 8 * 128 * 110_000  # a task for each 24 decoders begun, eight portions each
    decoders = 57 * (2 * 2 * 128 * 110_000 + 2 * 128 * image)
    workers = 8 * (128 * image + 2 * 128 * image)
    assert memory.object_store(plan) == readers + decoders + workers


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty pictures, of which one is none."""
    folder = tmp_path_factory.mktemp("doctor") / "shards"
    images = [encoded(noise(i, 30, 24), "JPEG" if i % 2 else "PNG") for i in range(50)]
    images[8] = b"nothing"
    stored(images, folder / "part.parquet", 20)
    return folder


def lines_of(text: str) -> list[str]:
    """Without those that a busy machine may make necessary."""
    return [line for line in text.splitlines() if not line.startswith("still ")]


def by_name(text: str) -> dict[str, str]:
    lines = [line for line in lines_of(text) if not line.startswith("warning: ")]
    return {line[:12].strip(): line[12:] for line in lines}


def test_the_whole(
    shards: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.main(["doctor"], "doc", [str(recipe), f"data.shards={shards}", f"run.folder={tmp_path}/r"])
    shown = capsys.readouterr()
    lines = by_name(shown.out)
    assert not shown.err
    assert set(lines) - {"shm"} == set(LINES) - {"run"}
    assert len(lines_of(shown.out)) < 30
    assert "2 CPUs" in lines["machine"]  # resources.cpus of the recipe
    assert "50 images in 1 file" in lines["shards"] and "not packed" in lines["shards"]
    assert "50 read" in lines["images"] and "50 % plain JPEGs" in lines["images"]
    assert lines["bad"] == "1 not_an_image, of 50 decoded"
    assert "median (lowest to highest), 50 images" in lines["whole"]
    assert "beside 2 cpu workers" in lines["rate"]
    assert not list(tmp_path.iterdir())  # nothing stays


def test_as_a_job_that_needs_no_ray(without_ray: Job, shards: Path, tmp_path: Path) -> None:
    shown = without_ray("doctor", f"data.shards={shards}", f"run.folder={tmp_path}")
    assert shown.returncode == 0, shown.stderr
    lines = by_name(shown.stdout)
    assert "decode CPUs" in lines["cpus"] and "images/s from" in lines["rate"]


MISTAKES = [
    (["data.shards=/not/there"], "no such path: /not/there", "data.shards"),
    (["data.source=photos"], "photos is not packed yet", "jobs/pack.py"),
    (["--fast"], "unknown option --fast", "options are --dry-run and --help"),
    (["data.shard=x"], "data.shard: no such field", "--help"),
    (["{shards}", "data.image_column=img"], 'has no column "img"', "data.image_column="),
    (["{shards}", "model.in_channels=7", "augment.mean=[0,0,0,0,0,0,0]"], "none of", "in_channels"),
    (["{shards}", "optim.global_batch_size=64"], "more than the 50 images", "recipe"),
    (["{shards}", "run.folder=/proc/runs"], "run.folder=/proc/runs cannot be written", "may write"),
]


@pytest.mark.parametrize(("arguments", "what", "hint"), MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes(
    arguments: list[str],
    what: str,
    hint: str,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [f"data.shards={shards}" if a == "{shards}" else a for a in arguments]
    if "model.in_channels=7" in given:
        given.append("augment.std=[1,1,1,1,1,1,1]")
    if not any(a.startswith("run.folder=") for a in given):
        given.append(f"run.folder={tmp_path}")
    with pytest.raises(SystemExit) as ended:
        job.main(["doctor"], "doc", given)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert what in lines[0]
    assert hint in lines[1]


def test_without_arguments_it_says_what_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job.main(["doctor"], "doc", [f"run.folder={tmp_path}"])
    lines = lines_of(capsys.readouterr().out)
    marks = {line.split()[1]: line.split()[0] for line in lines}
    asked = {"Python", "packages", "torch", "CPUs", "memory", "disk", "Ray", "MLflow", "extras"}
    assert asked <= set(marks)
    assert set(marks.values()) <= {"ok", "warning", "verdict"}
    assert lines[-1].startswith("verdict ") and "jobs/start.py" in lines[-1]
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_said_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(checkup, "FREE_DISK", 1e18)
    monkeypatch.setattr(checkup, "_unfit", lambda: ["ray is 2.0, not >=2.58"])
    with pytest.raises(SystemExit) as ended:
        job.main(["doctor"], "doc", [f"run.folder={tmp_path}"])
    assert ended.value.code == 2
    shown = capsys.readouterr().out
    assert "MISSING  packages     ray is 2.0, not >=2.58: python -m pip install" in shown
    assert re.search("warning  disk .* make room", shown)
    assert re.search("warning  MLflow .* does not answer: start it", shown)
    assert "no run works here yet: see packages" in shown


def test_little_shared_memory_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(surroundings, "SHARED_MEMORY", tmp_path)
    with caplog.at_level("INFO", logger="pipeline"):
        surroundings.shared_memory(load(["resources.object_store_gb=1e6"]))
        assert "resources.object_store_gb=1e+06" in caplog.text and "--shm-size" in caplog.text
        caplog.clear()
        surroundings.shared_memory(load(["resources.object_store_gb=0.001"]))
        assert "--shm-size" not in caplog.text


def test_large_unpacked_sets_are_said(
    monkeypatch: pytest.MonkeyPatch,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "UNPACKED_LIMIT", 10)
    job.main(["doctor"], "doc", [f"data.shards={shards}", f"run.folder={tmp_path}"])
    assert "warning: training refuses unpacked sets" in capsys.readouterr().out
