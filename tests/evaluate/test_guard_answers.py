"""What an evaluation hands to the guard, from a network and shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluate.guard.measure import IMAGES
from pipeline.evaluate.guard.structure import left_of
from pipeline.evaluate.teacher import EvaluationSpec, Evaluator
from pipeline.model.vit import BackboneSpec
from pipeline.shards.shards import ShardSet
from tests.data import encoded, stored

SPEC = BackboneSpec(image_size=16, patch_size=4, width=16, depth=1, heads=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    draw = np.random.default_rng(0)
    images = [encoded(draw.integers(0, 256, (20, 20, 3), np.uint8)) for _ in range(60)]
    labels = [i % 3 for i in range(60)]
    place: Path = tmp_path_factory.mktemp("shards") / "part.parquet"
    return stored({"image": images, "label": labels}, place, 10)


def spec_of(shards: ShardSet, labelled: bool) -> EvaluationSpec:
    mean = (0.5, 0.5, 0.5)
    reference = shards if labelled else None
    return EvaluationSpec(shards, reference, None, 16, 5, 0.07, mean, mean, 16, 0, 10**6, guard="")


def test_labels_give_hits_and_no_labels_the_structure(shards: ShardSet) -> None:
    backbone = SPEC.build()
    labelled = Evaluator(replace(spec_of(shards, True), keep=shards)).run(backbone)
    answers = labelled.answers
    assert answers.score is not None and answers.structure is None and answers.keep is not None
    assert answers.score.value == labelled.metrics["eval/knn5_top1"]
    assert answers.keep.value == labelled.metrics["eval/keep_knn5_top1"] == answers.score.value
    plain = Evaluator(spec_of(shards, False)).run(backbone).answers
    assert plain.score is None and plain.structure is not None
    assert len(plain.structure.ids) == min(60, IMAGES) == len(plain.structure.smoothness)
    assert left_of(plain.structure, plain.structure).interval.value == pytest.approx(1)
    off = Evaluator(replace(spec_of(shards, True), guard=None)).run(backbone)
    assert not off.answers


def test_the_key_changes_with_what_is_compared(shards: ShardSet) -> None:
    spec = spec_of(shards, True)
    others = [
        replace(spec, guard="knn10_top1"),
        replace(spec, keep=shards),
        replace(spec, k=7),
        replace(spec, half=True),
        replace(spec, decide_by="retrieval_map"),
    ]
    assert len({one.guard_key(50) for one in [spec, *others]} | {spec.guard_key(40)}) == 7
