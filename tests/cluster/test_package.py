"""What `ray job submit --working-dir .` uploads: built as Ray builds it, from a littered tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.nodes import ROOT

LIMIT = 4 * 2**20  # bytes; the sources are 2 of them: Ray stores the package without compressing it
LITTER = [
    ".env", ".git/config", ".venv/lib/torch.py", ".netrc", ".ray/auth_token", "auth_token",
    ".pytest_cache/v", ".mypy_cache/x.json", ".hypothesis/y", "__pycache__/z.pyc",
    "runs/demo/checkpoints/step-1/state.pt", "mlruns/0/meta", "mlflow.db", "photos/a.jpg",
    "shards/part-0.parquet", "tests/test_x.py", "docs/a.md", "benchmarks/b.py",
    "pipeline/__pycache__/c.pyc", "pipeline/.mypy_cache/d", "configs/.vits14.yaml.swp",
    "configs/.env", "weights.pth", "keys.json", "node_modules/m.js",
]  # fmt: skip
NEEDED = [
    "jobs/run.py", "jobs/pack.py", "jobs/curate.py", "jobs/pretrain.py", "jobs/evaluate.py",
    "jobs/export.py", "jobs/doctor.py", "pipeline/train/loop.py", "pipeline/report/report.css",
    "pipeline/report/page.html.j2", "pipeline/serve/page/page.js",
    "configs/demo.yaml", "constraints.txt", "mine.yaml", "mine.py",
]  # fmt: skip


def tracked() -> list[str]:
    """The files of a clone, with those that are new here."""
    command = ["git", "-c", "safe.directory=*", "ls-files"]  # whoever owns the checkout
    command += ["--cached", "--others", "--exclude-standard"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in shown.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture
def package(tmp_path: Path) -> zipfile.ZipFile:
    """Of a clone in which somebody has worked."""
    from ray._private.runtime_env.packaging import create_package

    clone = tmp_path / "clone"
    for name in tracked():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    for name in [*LITTER, "mine.yaml", "mine.py"]:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(b"x" * (2**20 if name.endswith((".pt", ".parquet")) else 10))
    created = tmp_path / "package.zip"
    create_package(str(clone), created, include_gitignore=True)
    return zipfile.ZipFile(created)


def test_the_upload_is_small_and_has_what_jobs_need(package: zipfile.ZipFile) -> None:
    names = set(package.namelist())
    assert Path(package.filename or "").stat().st_size < LIMIT
    assert not names & set(LITTER)
    assert {name.split("/")[0] for name in names} == {
        "pipeline", "jobs", "configs", "constraints.txt", "mine.yaml", "mine.py",
    }  # fmt: skip
    assert set(NEEDED) <= names
    mine = {name for name in tracked() if name.startswith(("pipeline/", "jobs/", "configs/"))}
    assert mine <= names  # nothing that belongs to the project is left behind


def runtime_env(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / name).read_text())
    return found


@pytest.mark.parametrize("name", ["runtime-env.yaml", "runtime-env-pip.yaml"])
def test_ray_takes_the_runtime_environments(name: str) -> None:
    from ray.runtime_env import RuntimeEnv

    found = RuntimeEnv(**runtime_env(name))
    assert int(found.env_vars()["RAY_JOB_STOP_WAIT_TIME_S"]) >= 120
    text = (ROOT / "cluster" / name).read_text()
    assert not re.search(r"https?://(?!10\.)", text)  # no host of anybody's
    assert "PASSWORD" not in text.upper().replace("PASSWORDS AND KEYS", "")


def test_the_pip_environment_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    first, *packages = runtime_env("runtime-env-pip.yaml")["pip"]["packages"]
    assert first == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    assert packages == [one for one in project if not one.startswith("ray[")]
