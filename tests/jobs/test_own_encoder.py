"""`model.encoder=module:…` through the jobs: a module in the folder where they are started trains,
resumes, and is used from the run folder when it has changed or gone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline import api
from pipeline.model.encoders.source import digest_of
from pipeline.model.foreign_weights import load_any
from pipeline.plan.resume import plan_of
from pipeline.train.checkpoint import state
from tests.jobs.conftest import ROOT

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(900)]
FILES = {
    "nets/parts.py": "WIDTH = 12\n",
    "nets/cnn.py": """\
import torch
from torch import nn

from .parts import WIDTH


class Net(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, WIDTH, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x))).mean((2, 3))


def small(in_channels: int) -> Net:
    return Net(in_channels)
""",
}
OWN = [
    "model.encoder=module:nets.cnn:small",
    "head.norm=batch",
    "head.input_norm=batch",
    "loss.ibot_weight=0",
    "loss.mask_probability=0",
    "optim.layerwise_decay=1",
    "augment.local_crops=0",
    "evaluate.image_size=20",  # what it is scored at is what it is used at; trained at 16
]


class Place:
    """A folder with a module, in which jobs are started."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        for name, text in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    def job(self, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / "jobs" / f"{name}.py", *map(str, arguments)],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
        )


@pytest.fixture(scope="module")
def place(
    images: Path,
    recipe: Path,
    cluster_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    yield Place(tmp_path_factory.mktemp("place"), cluster_environment)


@pytest.fixture(scope="module")
def given(images: Path, recipe: Path) -> list[str]:
    return [str(recipe), f"data.source={images}/train", f"evaluate.queries={images}/test", *OWN]


@pytest.fixture(scope="module")
def trained(place: Place, given: list[str]) -> str:
    """Console of the whole chain."""
    shown = place.job("run", *given, "export.onnx=true")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return shown.stdout + shown.stderr


def test_the_chain_ends_with_weights_and_the_text(place: Place, trained: str) -> None:
    run = place.folder / "runs" / "tiny"
    assert {name: (run / "encoder" / name).read_text() for name in FILES} == FILES
    plan = yaml.safe_load((run / "plan.yaml").read_text())
    assert plan["encoder"] == {"folder": "encoder", "digest": digest_of(FILES)}
    assert "encoder_files" not in plan
    saved = state.latest(run / "checkpoints")
    assert saved is not None and plan_of(saved.meta, saved.path).encoder_files == FILES
    assert (run / "weights" / "module" / "encoder" / "nets" / "cnn.py").is_file()
    assert (run / "weights" / "onnx" / "fp32-20.onnx").is_file()
    exported = json.loads((run / "export" / "_done.json").read_text())["result"]
    assert "module, loaded back and equal" in exported["text"]
    assert "module:nets.cnn:small, 12 wide (not used: model.width" in trained


def test_running_means_are_saved_and_the_same_whoever_reads_them(
    place: Place, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.folder / "runs" / "tiny"
    saved = state.best(run / "checkpoints")
    assert saved is not None
    teacher: dict[str, Any] = saved[0].teacher()
    counted = {n: int(x) for n, x in teacher.items() if n.endswith("num_batches_tracked")}
    # in the backbone, on the feature, and after two hidden layers
    assert len(counted) == 4 and set(counted.values()) == {saved[0].step}
    monkeypatch.chdir(place.folder)
    backbone: Any = load_any(run / "weights" / "module")[0]
    mean = teacher["backbone.module.norm.running_mean"]
    assert torch.equal(backbone.module.norm.running_mean, mean)
    embedder = api.open_embedder(api.embedder_of(str(run)))
    assert torch.equal(embedder.network.module.norm.running_mean, mean)
    exported = api.embedder_of(str(run / "weights" / "module"))
    assert embedder.spec.image_size == exported.image_size == 20


def test_a_changed_text_is_not_resumed_and_its_own_is_used_elsewhere(
    place: Place, trained: str, given: list[str], images: Path
) -> None:
    other = place.folder / "nets" / "parts.py"
    other.write_text("WIDTH = 13\n")
    try:
        shown = place.job("run", *given)
        assert shown.returncode == 2 and "Traceback" not in shown.stderr
        assert "the code of model.encoder=module:nets.cnn:small was changed" in shown.stderr
        assert "nets/parts.py" in shown.stderr and "run.name=…" in shown.stderr
        shutil.move(place.folder / "nets", place.folder / "away")
        run = place.folder / "runs" / "tiny"
        for name, arguments in {
            "evaluate": [f"model={run}", f"data={images}/test"],
            "embed": [f"model={run}/weights", f"data.source={images}/test", "run.name=e"],
            "finetune": [f"model={run}", f"data={images}/train", "finetune.epochs=1", "run.name=f"],
        }.items():
            shown = place.job(name, *arguments, "track.uri=none", "data.max_bad_fraction=0.1")
            assert shown.returncode == 0, shown.stdout + shown.stderr
            text = shown.stdout + shown.stderr
            assert "module:nets.cnn:small from the text kept in" in text, text
        tuned = place.folder / "runs" / "f"
        assert list(tuned.rglob("encoder/nets/cnn.py"))
        # the run itself is finished, and goes on without the module
        again = place.job("run", *given, "export.onnx=true")
        assert again.returncode == 0, again.stdout + again.stderr
    finally:
        if (place.folder / "away").exists():
            shutil.move(place.folder / "away", place.folder / "nets")
        other.write_text(FILES["nets/parts.py"])


def test_a_run_goes_on_exactly(place: Place, trained: str, given: list[str]) -> None:
    """Stopped by its length at half of the steps and resumed, the means are those of one go."""
    whole, parts = place.folder / "runs" / "tiny", place.folder / "parts" / "tiny"
    shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("weights", "export"))
    for folder in sorted((parts / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    (parts / "checkpoints" / "best.json").unlink(missing_ok=True)
    (parts / "pretrain" / "_done.json").unlink()
    shown = place.job("pretrain", *given, "run.folder=parts")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    ends = [state.latest(run / "checkpoints") for run in (whole, parts)]
    assert ends[0] is not None and ends[1] is not None and ends[0].step == ends[1].step
    one, two = (end.load() for end in ends if end is not None)
    for part in ("student", "teacher"):
        for name, value in one[part].items():
            torch.testing.assert_close(value, two[part][name], rtol=1e-5, atol=1e-6, msg=name)


BAD = {
    "module:nets.absent:small": "there is no module nets.absent",
    "module:nets.cnn:big": "has no function big",
    "module:nets.broken:small": "nets/broken.py line 1 is no Python",
}


@pytest.mark.parametrize("encoder", BAD)
def test_bad_encoders_are_said_before_any_work(
    place: Place, given: list[str], encoder: str
) -> None:
    (place.folder / "nets" / "broken.py").write_text("def small(:\n")
    shown = place.job("run", *given, f"model.encoder={encoder}", "run.name=bad")
    assert shown.returncode == 2 and "Traceback" not in shown.stderr
    assert BAD[encoder] in shown.stderr
    assert not (place.folder / "runs" / "bad" / "shards").exists()
