"""The evaluator on shards of planted truth: one colour a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.evaluate.deciding import why_unusable
from pipeline.evaluate.teacher import EvaluationSpec, Evaluator, read_images
from pipeline.model.vit import BackboneSpec
from pipeline.shards.shards import ShardSet
from tests.data import encoded, hub_table, stored

HEALTH = {"health/feature_std", "health/effective_rank"}
COLOURS = np.asarray([(200, 30, 30), (30, 200, 30), (30, 30, 200)])


class MeanColour(torch.nn.Module):
    """A backbone whose feature is the mean of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


NAMES = ["red", "green", "blue"]


def colours(folder: Path, named: list[tuple[str, bytes]], names: list[str] | None) -> ShardSet:
    """Images with the names of their classes as text, or as ids in `names`."""
    label = [name if names is None else names.index(name) for name, _ in named]
    table = hub_table([x for _, x in named], label, names or ())
    return stored(table, folder / "part.parquet", 16)


def picture(rng: np.random.Generator, colour: int | None) -> bytes:
    """A colour with grain, or noise where nothing can be learnt."""
    noise = rng.integers(-20, 20, (18, 18, 3)) + (0 if colour is None else COLOURS[colour])
    pixels = rng.integers(0, 256, (18, 18, 3)) if colour is None else noise
    return encoded(pixels.astype(np.uint8))


def top1(spec: EvaluationSpec, reference: ShardSet, queries: ShardSet) -> float:
    """k-NN of mean colours."""
    evaluator = Evaluator(replace(spec, sample=reference, reference=reference, queries=queries))
    backbone = MeanColour()
    backbone.scale = torch.nn.Parameter(torch.ones(()))
    backbone.forward_features = lambda x: {"x_norm_patchtokens": None}  # type: ignore[assignment]
    evaluation = evaluator.run(backbone)
    return evaluation.metrics[f"eval/knn{spec.k}_top1"]


def test_classes_are_compared_by_name(spec: EvaluationSpec, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    each = [(NAMES[i % 3], picture(rng, i % 3)) for i in range(60)]
    reference = colours(tmp_path / "ids", each[:36], NAMES)
    backwards = colours(tmp_path / "backwards", each[36:], NAMES[::-1])
    more = colours(tmp_path / "more", each[36:], ["ant", *sorted(NAMES), "zebra"])
    text = colours(tmp_path / "text", each[36:], None)
    for queries in (backwards, more, text):
        assert top1(spec, reference, queries) == 1.0
        assert top1(spec, queries, reference) == 1.0
    # a class that only one side has: right where it is not asked for, else wrong
    two = colours(tmp_path / "two", [x for x in each[36:] if x[0] != "green"], None)
    assert top1(spec, reference, two) == 1.0
    assert top1(spec, two, reference) == pytest.approx(2 / 3)


def test_the_same_image_does_not_vote_for_itself(spec: EvaluationSpec, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    noise = [(NAMES[i % 2], picture(rng, None)) for i in range(120)]
    queries = colours(tmp_path / "queries", noise[80:], None)
    honest = top1(spec, colours(tmp_path / "without", noise[:80], None), queries)
    both = top1(spec, colours(tmp_path / "with", noise, None), queries)
    itself = top1(spec, queries, queries)
    assert max(honest, both, itself) < 0.75  # 1.0 where images vote for themselves


def test_two_sets_of_one_digest_are_two_sets(spec: EvaluationSpec, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    right = [(NAMES[i % 3], picture(rng, i % 3)) for i in range(12)]
    wrong = [(NAMES[i % 3], picture(rng, (i + 1) % 3)) for i in range(12)]
    reference, queries = (colours(tmp_path / n, x, None) for n, x in (("a", right), ("b", wrong)))
    # as if the files of the two had the same names and sizes
    queries = replace(queries, digest=reference.digest)
    assert top1(replace(spec, k=3), reference, queries) == 0.0


def shards(folder: Path, images: int, seed: int, bad: int = 0) -> ShardSet:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, images)
    images = [picture(rng, label) for label in labels]
    images[:bad] = [b"broken"] * bad
    return stored({"image": images, "label": labels}, folder / "part.parquet", 16)


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
    evaluation = evaluator.run(MeanColour())  # type: ignore[arg-type]
    assert evaluation.metrics["eval/knn5_top1"] == 1.0


def test_without_labels_health_only(spec: EvaluationSpec) -> None:
    backbone = BackboneSpec(image_size=16, patch_size=8, width=24, depth=1, heads=2).build()
    plain = replace(spec, reference=None, queries=None)
    evaluation = Evaluator(plain).run(backbone)
    assert set(evaluation.metrics) == {*HEALTH, "eval/rank_me"}
    assert evaluation.decided_by == "" and evaluation.note == ""
    by_name = Evaluator(replace(plain, decide_by="rank_me")).run(backbone)
    assert by_name.metrics == evaluation.metrics and by_name.decided_by == "eval/rank_me"
    height, width, _ = evaluation.pictures["patch_pca"].shape
    assert height == width


def alone(spec: EvaluationSpec, folder: Path, named: list[tuple[str, bytes]]) -> EvaluationSpec:
    """Of one labelled set."""
    reference = colours(folder, named, None)
    return replace(spec, sample=reference, reference=reference, queries=None)


class Flat(MeanColour):
    """Without patches, so that there is no picture of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward_features(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        return {"x_norm_patchtokens": None}


def test_each_image_of_one_set_is_classified_by_the_others(
    spec: EvaluationSpec, tmp_path: Path
) -> None:
    rng = np.random.default_rng(8)
    named = [(NAMES[i % 3], picture(rng, i % 3)) for i in range(30)]
    evaluation = Evaluator(alone(spec, tmp_path / "colours", named)).run(Flat())
    assert evaluation.metrics["eval/knn5_top1"] == 1.0
    assert evaluation.decided_by == "eval/knn5_top1"
    assert set(evaluation.pictures) == {"neighbours"}
    # against a plain loop, on noise: nobody votes for itself, nor does a copy of the same bytes
    noise = [(NAMES[i % 2], picture(rng, None)) for i in range(40)]
    noise += noise[:5]
    one = replace(alone(spec, tmp_path / "noise", noise), k=1)
    evaluator = Evaluator(one)
    evaluation = evaluator.run(Flat())
    assert one.reference is not None
    rows = evaluator.features(Flat(), one.reference, None)
    x = torch.nn.functional.normalize(rows.features.double(), dim=1)
    hits = 0
    for i in range(len(x)):
        others = [j for j in range(len(x)) if (rows.ids[j] != rows.ids[i]).any()]  # type: ignore[index]
        best = max(others, key=lambda j, i=i: float(x[i] @ x[j]))  # type: ignore[misc]
        hits += int(rows.labels[best] == rows.labels[i])
    assert evaluation.metrics["eval/knn1_top1"] == pytest.approx(hits / len(x))
    assert 0.2 < hits / len(x) < 0.8


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (lambda i: "one", "all 30 labelled images are of one class"),
        (lambda i: f"file-{i}", "only 0 of 30 labelled images have another one of their class"),
        (lambda i: f"pair-{min(i, 18)}", "only 12 of 30 labelled images have another one"),
    ],
)
def test_labels_that_say_nothing_leave_health(
    spec: EvaluationSpec, tmp_path: Path, labels: Callable[[int], str], why: str
) -> None:
    rng = np.random.default_rng(9)
    named = [(labels(i), picture(rng, i % 3)) for i in range(30)]
    one = alone(spec, tmp_path / "set", named)
    evaluation = Evaluator(replace(one, decide_by="knn5_top1")).run(Flat())
    assert set(evaluation.metrics) == {*HEALTH, "eval/rank_me"}
    assert evaluation.note.startswith(f"labels are not used: {why}") and not evaluation.decided_by
    by_name = Evaluator(replace(one, decide_by="rank_me")).run(Flat())
    assert by_name.decided_by == "eval/rank_me" and by_name.note == evaluation.note
    assert Evaluator(one).top1(Flat()) is None
    assert why_unusable(torch.full((30,), -1)) == "no image has a label"
    assert why_unusable(torch.tensor([0, 0, 7, 7, 3, -1])) == ""


def test_the_score_that_decides_is_computed_beside_the_usual_one(spec: EvaluationSpec) -> None:
    scores = ("logistic_top1", "few_shot5_top1", "retrieval_map")
    for name in ("knn1_top1", "rank_me", "", *scores):
        evaluation = Evaluator(replace(spec, decide_by=name)).run(Flat())
        assert evaluation.decided_by == f"eval/{name or 'knn5_top1'}"
        named = {"eval/knn5_top1", "eval/rank_me", evaluation.decided_by}
        assert set(evaluation.metrics) == {*HEALTH, *named}
        if name in scores:
            # one colour a class: whoever learns tells them apart, in two sets and in one
            one = Evaluator(replace(spec, decide_by=name, queries=None)).run(Flat())
            assert evaluation.metrics[f"eval/{name}"] == one.metrics[f"eval/{name}"] == 1.0


def test_a_score_that_cannot_be_computed_leaves_the_usual_one(
    spec: EvaluationSpec, tmp_path: Path
) -> None:
    rng = np.random.default_rng(10)
    named = [(NAMES[i % 2], picture(rng, i % 2)) for i in range(4)]
    both = colours(tmp_path / "both", named, None)
    # all that could be learnt from is asked
    spec = replace(spec, sample=both, reference=both, queries=both, decide_by="logistic_top1")
    evaluation = Evaluator(spec).run(Flat())
    assert evaluation.decided_by == "eval/knn5_top1"
    assert evaluation.note.startswith("logistic_top1 is not computed: ")
    assert set(evaluation.metrics) == {*HEALTH, "eval/knn5_top1", "eval/rank_me"}


def test_a_backbone_that_gives_zeros_is_still_evaluated(spec: EvaluationSpec) -> None:
    backbone = Flat()
    backbone.forward = lambda x: 0 * x.mean((2, 3))  # type: ignore[method-assign]
    evaluation = Evaluator(replace(spec, reference=None, queries=None)).run(backbone)
    assert evaluation.metrics["eval/rank_me"] == evaluation.metrics["health/feature_std"] == 0


def test_a_backbone_without_patches_has_no_picture_of_them(spec: EvaluationSpec) -> None:
    class WithoutPatches(MeanColour):
        def forward_features(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
            return {"x_norm_clstoken": self(x), "x_norm_patchtokens": None}

    backbone = WithoutPatches()
    backbone.scale = torch.nn.Parameter(torch.ones(()))  # says where the backbone is
    evaluation = Evaluator(spec).run(backbone)
    assert evaluation.metrics["eval/knn5_top1"] == 1.0
    assert set(evaluation.pictures) == {"neighbours"}


def test_bad_rows_are_counted_and_a_limit_is_a_fixed_draw(spec: EvaluationSpec) -> None:
    assert spec.queries is not None
    whole = list(read_images(spec.queries, spec, None))
    assert [len(part.images) for part in whole] == [16, 16, 5]
    limited, again = (
        np.concatenate([part.images for part in read_images(spec.queries, spec, 10)])
        for _ in range(2)
    )
    assert np.array_equal(limited, again)
    assert 7 <= len(limited) <= 10


def test_targets_of_a_teacher_that_chooses_by_colour(spec: EvaluationSpec) -> None:
    head = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.eye_(head.weight)
    teacher = SimpleNamespace(backbone=MeanColour(), dino_head=head)
    health = Evaluator(spec).target_health(teacher, 0.01)  # type: ignore[arg-type]
    assert health["health/prototypes_used"] == 3
    assert health["health/teacher_entropy"] < 0.05


def test_what_a_knn_compares_is_said_with_and_without_a_limit(spec: EvaluationSpec) -> None:
    queries, reference = spec.queries, spec.reference
    assert queries is not None and reference is not None
    whole = spec.compared()
    assert whole == f"{queries.rows} queries by {reference.rows} reference images"
    assert spec.compared(10**6) == whole
    assert spec.compared(3) == (
        f"3 of {queries.rows} queries by 3 of {reference.rows} reference images"
    )
    alone = replace(spec, queries=None)
    assert alone.compared() == f"each of {reference.rows} images by the others"
    assert alone.compared(3) == f"each of 3 of {reference.rows} images by the others"
    assert replace(alone, reference=None).compared() == ""


def test_scores_of_other_images_or_settings_have_another_key(spec: EvaluationSpec) -> None:
    assert spec.queries and spec.reference
    most = max(spec.queries.rows, spec.reference.rows)
    names = tuple(f"{name}!" for name in spec.queries.class_names) or ("a", "b", "c")
    others = [
        replace(spec, k=spec.k + 1),
        replace(spec, image_size=spec.image_size + 1),
        replace(spec, queries=replace(spec.queries, digest="x")),
        replace(spec, reference=replace(spec.reference, value_range=(0.0, 9.0))),
        replace(spec, reference=replace(spec.reference, class_names=names)),
        replace(spec, queries=None),
    ]
    assert len({spec.key(), spec.key(2), *(one.key() for one in others)}) == len(others) + 2
    assert replace(spec, batch_size=spec.batch_size + 1).key() == spec.key()
    assert spec.key(most) == spec.key() == replace(spec, seed=spec.seed + 1).key()
    assert replace(spec, seed=spec.seed + 1).key(2) != spec.key(2)
