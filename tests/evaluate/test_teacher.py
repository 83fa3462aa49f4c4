"""The evaluator on shards of planted truth: one colour a class."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.data.schema import ShardSet, open_shards
from pipeline.data.storage import resolve_uri
from pipeline.data.transfer import write_parquet_atomic
from pipeline.evaluate.teacher import EvaluationSpec, Evaluator, read_images
from pipeline.model.pair import BackboneSpec

COLOURS = np.asarray([(200, 30, 30), (30, 200, 30), (30, 30, 200)])


class MeanColour(torch.nn.Module):
    """A backbone whose feature is the mean of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def shards(folder: Path, images: int, seed: int, bad: int = 0) -> ShardSet:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, images)
    encoded = []
    for label in labels:
        buffer = io.BytesIO()
        noise = rng.integers(-20, 20, (18, 18, 3))
        Image.fromarray((COLOURS[label] + noise).astype(np.uint8)).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    encoded[:bad] = [b"broken"] * bad
    table = pa.table(
        {"image": pa.array(encoded, pa.binary()), "label": pa.array(labels, pa.int64())}
    )
    fs, path = resolve_uri(str(folder / "part.parquet"))
    write_parquet_atomic(table, fs, path, row_group_size=16)
    return open_shards(str(folder))


@pytest.fixture
def spec(tmp_path: Path) -> EvaluationSpec:
    for name in "rq":
        (tmp_path / name).mkdir()
    reference = shards(tmp_path / "r", 60, 0)
    return EvaluationSpec(
        sample=reference,
        reference=reference,
        queries=shards(tmp_path / "q", 40, 1, bad=3),
        image_size=16,
        k=5,
        temperature=0.07,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        batch_size=16,
        seed=0,
        max_pixels=1000,
    )


def test_colours_are_told_apart(spec: EvaluationSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = Evaluator(spec)
    monkeypatch.setattr("pipeline.evaluate.teacher.pca_grid", lambda *_: np.zeros((8, 8, 3)))
    found = evaluator.run(MeanColour())  # type: ignore[arg-type]
    assert found.metrics["eval/knn5_top1"] == 1.0
    assert evaluator.raw_pixels() == 1.0


def test_without_labels_health_only(spec: EvaluationSpec) -> None:
    backbone = BackboneSpec(image_size=16, patch_size=8, width=24, depth=1, heads=2).build()
    found = Evaluator(replace(spec, reference=None, queries=None)).run(backbone)
    assert set(found.metrics) == {"health/feature_std", "health/effective_rank"}
    height, width, _ = found.pictures["patch_pca"].shape
    assert height == width


def test_a_backbone_without_patches_has_no_picture_of_them(spec: EvaluationSpec) -> None:
    class WithoutPatches(MeanColour):
        def forward_features(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
            return {"x_norm_clstoken": self(x), "x_norm_patchtokens": None}

    backbone = WithoutPatches()
    backbone.scale = torch.nn.Parameter(torch.ones(()))  # says where the backbone is
    found = Evaluator(spec).run(backbone)
    assert found.metrics["eval/knn5_top1"] == 1.0
    assert set(found.pictures) == {"neighbours"}


def test_bad_rows_are_counted_and_a_limit_is_a_fixed_draw(spec: EvaluationSpec) -> None:
    assert spec.queries is not None
    whole = list(read_images(spec.queries, spec, None))
    assert [len(part.images) for part in whole] == [16, 16, 5]
    some, again = (
        np.concatenate([part.images for part in read_images(spec.queries, spec, 10)])
        for _ in range(2)
    )
    assert np.array_equal(some, again)
    assert 7 <= len(some) <= 10


def test_targets_of_a_teacher_that_chooses_by_colour(spec: EvaluationSpec) -> None:
    head = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.eye_(head.weight)
    teacher = SimpleNamespace(backbone=MeanColour(), dino_head=head)
    found = Evaluator(spec).target_health(teacher, 0.01)  # type: ignore[arg-type]
    assert found["health/prototypes_used"] == 3
    assert found["health/teacher_entropy"] < 0.05


def test_what_a_knn_compares_is_said_with_and_without_a_limit(spec: EvaluationSpec) -> None:
    queries, reference = spec.queries, spec.reference
    assert queries is not None and reference is not None
    whole = spec.compared()
    assert whole == f"{queries.rows} queries by {reference.rows} reference images"
    assert spec.compared(10**6) == whole
    assert spec.compared(3) == (
        f"3 of {queries.rows} queries by 3 of {reference.rows} reference images"
    )
    assert replace(spec, queries=None).compared() == ""
