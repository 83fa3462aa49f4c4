"""`train.tune` in whole jobs: what is frozen stays, and a stopped run ends with the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs.conftest import ROOT, runner
from tests.jobs.running import finish
from tests.jobs.test_resume import arguments, stop_midway
from tests.tiny import STEPS

pytestmark = [pytest.mark.slow, pytest.mark.jobs, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def weights(
    images: Path,
    recipe: Path,
    cluster_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Of a short run of the same network: they are what is tuned."""
    folder = tmp_path_factory.mktemp("start")
    short = ["optim.steps=5", "run.name=start"]
    shown = runner(cluster_environment)("run", *arguments(images, recipe, folder), *short)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return folder / "start" / "weights" / "dinov2"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors, by file and name."""
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("tune", ["lora(rank=2)", "last_blocks=1"])
def test_a_stopped_run_that_tunes_ends_with_the_same_bits(
    tune: str,
    images: Path,
    recipe: Path,
    weights: Path,
    cluster_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    def command(folder: Path) -> list[str]:
        fields = [f"model.init={weights}", f"train.tune={tune}", "guard.enabled=false"]
        return [*arguments(images, recipe, folder), *fields]

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    shown = runner(cluster_environment)("run", *command(whole))
    assert shown.returncode == 0, shown.stdout + shown.stderr

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "jobs" / "run.py"), *command(stopped)],
            env=cluster_environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    code, console = stop_midway(start(), stopped)
    assert code == 143, console
    code, console = finish(start())
    assert code == 0, console
    assert "resumed     from the checkpoint at step" in console

    last = Path("tiny") / "checkpoints" / f"step-{STEPS:08d}"
    mine, expected = tensors(stopped / last), tensors(whole / last)
    assert mine.keys() == expected.keys() and len(expected) > 10
    for name, tensor in expected.items():
        assert torch.equal(mine[name], tensor), name

    # the export has plain weights, of which some moved and the frozen ones did not
    before = load_file(weights / "model.safetensors")
    after = load_file(whole / "tiny" / "weights" / "dinov2" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("blocks.1.") for name in moved)
    assert not any(name.startswith(("patch_embed", "cls_token", "pos_embed")) for name in moved)
