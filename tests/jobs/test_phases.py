"""What comes after a first run, or beside it: recipes of later phases, other encoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.jobs.conftest import ROOT, runner
from tests.jobs.test_resume import arguments, journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# The recipes of configs/ on networks and images of seconds
SMALL = [
    *["augment.local_crops=2", "augment.local_size=8", "model.patch_size=4"],
    *["head.prototypes=64", "head.bottleneck=16", "head.hidden=32"],
    *["optim.passes=null", "optim.steps=8", "optim.global_batch_size=16", "optim.warmup=0"],
    *["optim.freeze_last_layer=0", "train.accumulation=2", "train.workers=2"],
    *["train.log_every=1", "train.save_every=8", "train.eval_every=8", "train.precision=float32"],
    *["evaluate.batch_size=32", "track.enabled=false", "data.max_bad_fraction=0.05"],
    *["data.shuffle_images=32", "data.row_group_images=16"],
    *["resources.cpus=2", "resources.object_store_gb=0.2", "resources.threads=1"],
]
TINY_MODEL = ["model.width=32", "model.depth=2", "model.heads=2", "model.registers=1"]


@pytest.fixture(scope="module")
def first(
    images: Path,
    recipe: Path,
    cluster_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The run folder of a first phase."""
    folder = tmp_path_factory.mktemp("first")
    command = [*arguments(images, recipe, folder), "optim.steps=10", "evaluate.queries="]
    shown = runner(cluster_environment)("run", *command)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return folder / "tiny"


def test_the_high_resolution_recipe(
    first: Path, images: Path, cluster_environment: dict[str, str], tmp_path: Path
) -> None:
    shown = runner(cluster_environment)(
        "run",
        ROOT / "configs" / "highres.yaml",
        *SMALL,
        *TINY_MODEL,
        "augment.global_size=24",
        f"model.init={first}",
        f"data.shards={first}/shards",
        f"run.folder={tmp_path}",
        "run.name=tiny",
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "init        " in shown.stdout and "with dino_head" in shown.stdout
    assert list(journal(tmp_path)) == list(range(8))
    weights = load_file(tmp_path / "tiny" / "weights" / "dinov2" / "model.safetensors")
    assert weights["pos_embed"].shape == (1, 1 + 6 * 6, 32)  # 24 pixels instead of 16
    before = load_file(first / "weights" / "dinov2" / "model.safetensors")
    name = "blocks.0.attn.proj.weight"
    close = torch.nn.functional.cosine_similarity(
        weights[name].flatten(), before[name].flatten(), dim=0
    )
    assert float(close) > 0.9  # it went on from there


def test_the_distillation_recipe(
    first: Path, images: Path, cluster_environment: dict[str, str], tmp_path: Path
) -> None:
    command = [
        str(ROOT / "configs" / "distill.yaml"),
        *SMALL,
        "model.width=16",
        "model.depth=1",
        "model.heads=1",
        "augment.global_size=16",
        f"distill.teacher={first}",
        f"data.shards={first}/shards",
        f"run.folder={tmp_path}",
        "run.name=tiny",
    ]
    shown = runner(cluster_environment)("run", *command)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"teacher     {first}/checkpoints/step-" in shown.stdout
    rows = journal(tmp_path)
    assert list(rows) == list(range(8))
    assert all(row["loss/ibot"] > 0 for row in rows.values())
    # the result is the average of the student, not the teacher
    config = json.loads((tmp_path / "tiny" / "weights" / "dinov2" / "config.json").read_text())
    assert config["width"] == 16
    again = runner(cluster_environment)("run", *command)
    assert again.returncode == 0 and "pretrain    up to date" in again.stdout


def test_the_recipe_for_any_teacher(
    first: Path, images: Path, cluster_environment: dict[str, str], tmp_path: Path
) -> None:
    """From exported weights, without heads, with two workers; and on from a checkpoint."""
    weights = first / "weights" / "timm"
    command = [
        str(ROOT / "configs" / "distill_any.yaml"),
        *SMALL,
        *("model.width=16", "model.depth=1", "model.heads=1", "augment.global_size=24"),
        *("distill.image_size=16", f"distill.teacher={weights}", f"data.shards={first}/shards"),
        *(f"run.folder={tmp_path}", "run.name=tiny", "train.save_every=4"),
    ]
    shown = runner(cluster_environment)("run", *command)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"teacher     {weights}, frozen" in shown.stdout
    assert "cosine to its features" in shown.stdout
    assert "CLS 1 (16 to 32 wide), patches 1 (4 x 4 resampled to 6 x 6)" in shown.stdout
    assert "no heads are built" in shown.stdout and "resized from 24 to 16 pixels" in shown.stdout
    rows = journal(tmp_path)
    assert list(rows) == list(range(8))
    for row in rows.values():
        total = row["loss/distil_cls"] + row["loss/distil_patch"]
        assert row["loss/total"] == pytest.approx(total, 1e-5)
        assert "loss/ibot" not in row and "loss/dino_global" not in row
    config = json.loads((tmp_path / "tiny" / "weights" / "dinov2" / "config.json").read_text())
    assert config["width"] == 16
    shutil.rmtree(tmp_path / "tiny" / "checkpoints" / "step-00000008")
    (tmp_path / "tiny" / "pretrain" / "_done.json").unlink()
    again = runner(cluster_environment)("run", *command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "from the checkpoint at step 4" in again.stdout
    once_more = journal(tmp_path)
    for step in range(4, 8):
        assert once_more[step]["loss/total"] == pytest.approx(rows[step]["loss/total"], 1e-5)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vit", ["model.encoder=timm:vit_tiny_patch16_224", "model.patch_size=16"]),
        (
            "convnet",
            ["model.encoder=timm:convnext_atto", "model.patch_size=16", "loss.ibot_weight=0"]
            + ["loss.mask_probability=0"],
        ),
        ("dino", ["objective=dino"]),
        (
            "grey",
            ["model.in_channels=1", "augment.mean=[0.5]", "augment.std=[0.25]", "data.source={}"],
        ),
    ],
)
def test_other_encoders_and_objectives(
    first: Path,
    images: Path,
    recipe: Path,
    cluster_environment: dict[str, str],
    tmp_path: Path,
    name: str,
    overrides: list[str],
) -> None:
    """The whole chain, evaluation and export included, with two workers."""
    if name in ("vit", "convnet"):
        pytest.importorskip("timm", reason="needs timm")
        overrides = [*overrides, "augment.global_size=64", "augment.local_size=32"]
    data = f"data.shards={first}/shards"
    if name == "grey":
        overrides, data = overrides[:-1], f"data.source={images}/train"
    shown = runner(cluster_environment)(
        "run",
        recipe,
        data,
        f"run.folder={tmp_path}",
        f"evaluate.queries={images}/test" if name == "grey" else "evaluate.queries=",
        "optim.steps=6",
        "train.eval_every=6",
        *overrides,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    rows = journal(tmp_path)
    assert list(rows) == list(range(6))
    assert ("loss/ibot" in rows[0]) is (name in ("vit", "grey"))
    assert ("loss/koleo" in rows[0]) is (name != "dino")
    weights = tmp_path / "tiny" / "weights"
    written = {path.name for path in weights.iterdir()}
    if name in ("vit", "convnet"):
        assert written == {"timm"}
        import timm

        model = timm.create_model(f"local-dir:{weights / 'timm'}", pretrained=True)
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, model.num_features)
    else:
        assert written == {"dinov2", "huggingface", "timm"}
    if name == "grey":
        tensors = load_file(weights / "dinov2" / "model.safetensors")
        assert tensors["patch_embed.proj.weight"].shape[1] == 1
        assert "saturation, hue, greyscale need RGB and are skipped" in shown.stdout
