"""Scores of whole sets with planted truths, through raw pixels and through a small network."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.card.dense import (
    DenseSet,
    DenseSettings,
    dense_baselines,
    dense_results,
    open_dense_set,
)
from pipeline.card.dense.results import constant_results, model_results, pixel_results
from pipeline.card.dense.split import Split
from pipeline.embed.embedders import EmbedderSpec
from pipeline.errors import DataError
from pipeline.evaluate.score import difference
from tests.card.dense.planted import depth_set, mask_set, network, npy, painted, write
from tests.data import encoded

SETTINGS = DenseSettings(size=32, batch_size=4)
SEGMENTATION = ["segmentation_linear_miou", "segmentation_nearest_miou"]
DEPTH = [
    f"depth_{head}_{error}" for head in ("linear", "head") for error in ("rmse", "rel", "delta1")
]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of few steps: the sets are small and easy."""
    from pipeline.evaluate.dense import depth, segmentation

    monkeypatch.setattr(segmentation, "SCHEDULE", replace(segmentation.SCHEDULE, steps=60))
    monkeypatch.setattr(depth, "LINEAR", replace(depth.LINEAR, steps=40))
    monkeypatch.setattr(depth, "SMALL", replace(depth.SMALL, steps=60))


def small(load: Any = network) -> EmbedderSpec:
    return EmbedderSpec("backbone", "small", "1", load=load, image_size=32)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> tuple[DenseSet, DenseSet]:
    root = tmp_path_factory.mktemp("masks")
    return (
        open_dense_set(mask_set(root / "train", 12)),
        open_dense_set(mask_set(root / "test", 6, seed=100)),
    )


@pytest.fixture(scope="module")
def depths(tmp_path_factory: pytest.TempPathFactory) -> tuple[DenseSet, DenseSet]:
    root = tmp_path_factory.mktemp("depth")
    return (
        open_dense_set(depth_set(root / "train", 12)),
        open_dense_set(depth_set(root / "test", 6, seed=100)),
    )


@pytest.mark.long
def test_colours_that_are_classes_are_found_by_pixels_and_by_an_untrained_network(
    masks: tuple[DenseSet, DenseSet],
) -> None:
    """Fields are two patches wide, so that bilinear scores lose pixels at their edges only."""
    for results in (pixel_results(*masks, SETTINGS, 16), model_results(small(), *masks, SETTINGS)):
        assert list(results) == SEGMENTATION
        for result in results.values():
            assert result.interval.value > 0.8
            assert result.interval.low <= result.interval.value <= result.interval.high
            assert result.details["pixel_accuracy"] > 0.85
            assert list(result.details["iou"]) == ["0", "1", "2"]
            assert result.details["reference_images"] == 12
            assert result.details["images"] == 6
            assert result.score is not None
            assert (result.score.ids == masks[1].ids).all()
            known = result.score.terms[:, 3:6].sum()
            assert known == 6 * 48 * 32  # each pixel of the masks' own size counts once


def test_the_constant_is_the_most_frequent_class(masks: tuple[DenseSet, DenseSet]) -> None:
    reference, queries = masks
    counts = sum(np.bincount(s.mask.ravel(), minlength=3) for s in reference.samples(range(12)))  # type: ignore[union-attr]
    best = int(np.argmax(counts))
    truths = np.stack([s.mask for s in queries.samples(range(6))])  # type: ignore[arg-type]
    results = constant_results(reference, queries, SETTINGS)
    assert list(results) == SEGMENTATION
    for result in results.values():
        share = (truths == best).mean()
        assert result.interval.value == pytest.approx(share / 3)
        assert result.details["pixel_accuracy"] == pytest.approx(share)


def test_classes_that_nothing_says_are_not_found(tmp_path: Path) -> None:
    """Masks of other images: as good as a constant, with classes that are as frequent."""
    mask_set(tmp_path, 12)
    for number in range(12):
        mask = painted(500 + number)[1]
        (tmp_path / f"masks/{number:03}.png").write_bytes(encoded(mask))
    dense = open_dense_set(str(tmp_path))
    results = pixel_results(dense, None, SETTINGS, 16)
    assert all(result.interval.value < 0.4 for result in results.values())


def test_depth_that_colours_say_is_found(depths: tuple[DenseSet, DenseSet]) -> None:
    constant = constant_results(*depths, SETTINGS)
    assert list(constant) == DEPTH
    for results in (pixel_results(*depths, SETTINGS, 8), model_results(small(), *depths, SETTINGS)):
        assert list(results) == DEPTH
        assert results["depth_head_delta1"].interval.value > 0.8
        for head in ("linear", "head"):
            for error, better in (("rmse", -1), ("rel", -1), ("delta1", 1)):
                name = f"depth_{head}_{error}"
                ours, theirs = results[name].score, constant[name].score
                assert ours is not None
                assert theirs is not None
                assert better * difference(ours, theirs).value > 0


def test_the_constant_depth_is_the_mean_of_known_pixels(tmp_path: Path) -> None:
    pixels = [painted(seed)[0] for seed in range(3)]
    values = [np.full((48, 32), one, np.float32) for one in (2, 5, 4)]
    values[1][:24] = 0  # unknown: half of it weighs half
    files = {f"images/{n}.png": encoded(pixels[n]) for n in range(3)}
    files |= {f"depth/{n}.npy": npy(values[n]) for n in range(3)}
    reference, queries = tmp_path / "a", tmp_path / "b"
    write(reference, {name: content for name, content in files.items() if "2" not in name})
    write(queries, {name: content for name, content in files.items() if "2" in name})
    sets = open_dense_set(str(reference)), open_dense_set(str(queries))
    results = constant_results(*sets, SETTINGS)  # (2 + 5 / 2) / 1.5 = 3, the truth is 4
    assert results["depth_linear_rmse"].interval.value == pytest.approx(1)
    assert results["depth_linear_rel"].interval.value == pytest.approx(0.25)
    assert results["depth_head_delta1"].interval.value == 0  # 4 / 3 is above 1.25


def test_without_queries_a_part_is_held_out_by_the_images_alone(tmp_path: Path) -> None:
    dense = open_dense_set(mask_set(tmp_path / "a", 60))
    split = Split.of(dense, None, SETTINGS)
    assert not set(split.rows) & set(split.asked)
    assert sorted(split.rows + split.asked) == list(range(60))
    assert 4 <= len(split.asked) <= 22  # of 12 that are expected
    for n in range(60):  # other names, another order
        for folder in ("images", "masks"):
            (tmp_path / f"a/{folder}/{n:03}.png").rename(tmp_path / f"a/{folder}/{59 - n:03}x.png")
    again = Split.of(open_dense_set(str(tmp_path / "a")), None, SETTINGS)
    assert {bytes(one) for one in again.ids} == {bytes(one) for one in split.ids}


def test_images_that_are_in_both_sets_are_not_fitted_to(tmp_path: Path) -> None:
    reference, queries = mask_set(tmp_path / "a", 6), mask_set(tmp_path / "b", 3, seed=4)
    split = Split.of(open_dense_set(reference), open_dense_set(queries), SETTINGS)
    assert split.rows == [0, 1, 2, 3]  # 4 and 5 are also queries
    assert split.asked == [0, 1, 2]


def test_equal_images_stay_together(tmp_path: Path) -> None:
    mask_set(tmp_path, 2)
    for name in ("images", "masks"):
        for copy in range(3):
            content = (tmp_path / f"{name}/000.png").read_bytes()
            (tmp_path / f"{name}/copy{copy}.png").write_bytes(content)
    split = Split.of(open_dense_set(str(tmp_path)), None, SETTINGS)
    assert sorted((len(split.rows), len(split.asked))) == [1, 4]


def test_few_reference_images_are_chosen_by_their_bytes(masks: tuple[DenseSet, DenseSet]) -> None:
    few = replace(SETTINGS, reference_images=5)
    split = Split.of(*masks, few)
    order = sorted(range(12), key=lambda row: bytes(masks[0].ids[row]))
    assert split.rows == sorted(order[:5])
    assert len(split.asked) == 6


def test_a_class_of_the_queries_alone_counts_as_never_found(tmp_path: Path) -> None:
    reference = open_dense_set(mask_set(tmp_path / "a", 8, classes=2))
    queries = open_dense_set(mask_set(tmp_path / "b", 4, seed=50, classes=3))
    result = pixel_results(reference, queries, SETTINGS, 16)["segmentation_linear_miou"]
    assert result.details["iou"]["2"] == 0
    assert result.details["without_reference"] == ["2"]


def test_sets_that_do_not_fit_are_refused(tmp_path: Path, masks: Any, depths: Any) -> None:
    with pytest.raises(DataError, match="has masks with void"):
        Split.of(masks[0], depths[1], SETTINGS)
    one_class = open_dense_set(mask_set(tmp_path / "one", 6, classes=1))
    with pytest.raises(DataError, match="one class only"):
        Split.of(one_class, None, SETTINGS)
    alone = open_dense_set(mask_set(tmp_path / "alone", 1))
    with pytest.raises(DataError, match="leaves"):
        Split.of(alone, None, SETTINGS)
    with pytest.raises(DataError, match="leaves 0 images to fit to"):
        Split.of(masks[0], masks[0], SETTINGS)


def test_a_model_without_patches_is_refused(masks: tuple[DenseSet, DenseSet]) -> None:
    with pytest.raises(DataError, match="no patch tokens"):
        model_results(EmbedderSpec(), *masks, SETTINGS)


def test_a_size_that_patches_do_not_divide_is_refused(masks: tuple[DenseSet, DenseSet]) -> None:
    with pytest.raises(DataError, match="image of 30 x 30 pixels") as refusal:
        model_results(small(), *masks, replace(SETTINGS, size=30))
    assert "evaluate.dense_size" in refusal.value.hint


def test_a_seed_gives_the_same_scores_again(masks: tuple[DenseSet, DenseSet]) -> None:
    few = replace(SETTINGS, memory_patches=96)
    first, again = (pixel_results(*masks, few, 8) for _ in range(2))
    other = pixel_results(*masks, replace(few, seed=1), 8)
    for name in SEGMENTATION:
        assert first[name].interval == again[name].interval
        assert abs(first[name].interval.value - other[name].interval.value) < 0.05
    assert first[SEGMENTATION[1]].interval != other[SEGMENTATION[1]].interval


def test_depth_of_few_points_is_learnt_from_all_of_them(tmp_path: Path) -> None:
    """As a laser measures it: one pixel in fifty is known."""
    depth_set(tmp_path, 12)
    for number in range(12):
        path = tmp_path / f"depth/{number:03}.npy"
        depth = np.load(path)
        depth[np.random.default_rng(number).random(depth.shape) > 0.02] = np.nan
        path.write_bytes(npy(depth))
    dense = open_dense_set(str(tmp_path))
    results, constant = (
        pixel_results(dense, None, SETTINGS, 8),
        constant_results(dense, None, SETTINGS),
    )
    assert (
        results["depth_head_rel"].interval.value < 0.6 * constant["depth_head_rel"].interval.value
    )


def test_models_and_baselines_run_as_tasks(
    ray_cluster: None, masks: tuple[DenseSet, DenseSet]
) -> None:
    results = dense_results(small(partial(network)), *masks, SETTINGS)
    assert list(results) == SEGMENTATION
    baselines = dense_baselines(*masks, SETTINGS, grid=results[SEGMENTATION[0]].details["grid"])
    assert list(baselines) == ["raw_pixels", "majority"]
    assert list(baselines["raw_pixels"]) == SEGMENTATION
    with pytest.raises(DataError, match="no patch tokens"):
        dense_results(EmbedderSpec(), *masks, SETTINGS)
