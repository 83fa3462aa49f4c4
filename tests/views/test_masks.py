"""Block masks against the reference's own, and the law of the batch."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.views.masks import MaskSpec, block_mask, masks_for

GOLDEN = Path(__file__).parents[1] / "golden"
STATS = json.loads((GOLDEN / "mask_stats.json").read_text())
GRIDS = sorted(STATS)


@pytest.mark.parametrize("name", GRIDS)
def test_masks_are_the_references_bit_by_bit(name: str) -> None:
    side = STATS[name]["input_size"]
    exact = STATS[name]["exact_python_random_seed0"]
    rng = random.Random(0)
    for ratio, packed in zip(exact["ratios"], exact["packbits"], strict=True):
        mask = block_mask((side, side), int(side * side * ratio), rng)
        assert np.packbits(mask, axis=None).tolist() == np.asarray(packed).reshape(-1).tolist()


def test_counts_have_the_references_distribution() -> None:
    rng = random.Random(1)
    for stat in STATS["grid16_p14"]["stats"]:
        counts = [block_mask((16, 16), stat["target"], rng).sum() for _ in range(300)]
        assert max(counts) <= stat["target"]
        assert np.mean(counts) == pytest.approx(stat["mean"], abs=0.15)
        exact = np.mean([count == stat["target"] for count in counts])
        assert exact == pytest.approx(stat["frac_exact"], abs=0.08)


def test_the_collate_law_gives_the_references_batch() -> None:
    """The reference deals bins in order and shuffles the views; its seed gives its masks."""
    golden = torch.load(GOLDEN / "collate.pt", weights_only=True)
    rng = random.Random(golden["seed"])
    views, side = 2 * golden["B"], golden["hw"]
    edges = torch.linspace(0.1, 0.5, views // 2 + 1)
    masks = [
        block_mask(
            (side, side),
            int(side * side * rng.uniform(float(edges[i]), float(edges[i + 1]))),
            rng,
        )
        for i in range(views // 2)
    ] + [np.zeros((side, side), dtype=bool)] * (views - views // 2)
    rng.shuffle(masks)
    assert np.array_equal(np.stack(masks).reshape(views, -1), golden["collated_masks"].numpy())


def test_any_number_of_global_crops_has_the_law_of_as_many_views() -> None:
    """Three crops of 20 images are 60 views: half of them masked, the bins dealt out over all."""
    masks = masks_for(3, 7, np.arange(20), 20, MaskSpec((16, 16), global_crops=3))
    counts = masks.sum(axis=2)
    assert counts.shape == (20, 3) and (counts > 0).sum() == 30
    edges = np.linspace(0.1, 0.5, 31) * 256
    hidden = np.sort(counts[counts > 0])
    assert (hidden <= np.ceil(edges[1:])).all() and (hidden > edges[:-1] - 8).all()


def test_half_of_the_views_are_masked_each_from_its_own_bin() -> None:
    batch, grid = 32, (16, 16)
    masks = masks_for(3, 7, np.arange(batch), batch, MaskSpec(grid))
    assert masks.shape == (batch, 2, 256)
    counts = np.sort(masks.sum(axis=2).reshape(-1))
    assert (counts[:batch] == 0).all()
    edges = np.linspace(0.1, 0.5, batch + 1)
    upper = (256 * edges[1:]).astype(int)
    lower = (256 * edges[:-1]).astype(int)
    assert (counts[batch:] <= upper).all()
    assert (counts[batch:] >= lower - 8).all()  # the block algorithm may end a few patches short


def test_a_mask_does_not_depend_on_the_split() -> None:
    whole = masks_for(0, 5, range(12), 12, MaskSpec((8, 8)))
    order = np.random.default_rng(0).permutation(12)
    parts = [masks_for(0, 5, part, 12, MaskSpec((8, 8))) for part in np.array_split(order, 5)]
    assert np.array_equal(np.concatenate(parts), whole[order])
    assert not np.array_equal(whole, masks_for(0, 6, range(12), 12, MaskSpec((8, 8))))
    assert not np.array_equal(whole, masks_for(1, 5, range(12), 12, MaskSpec((8, 8))))


def test_the_stream_of_masks_stays_as_it_is() -> None:
    """A changed stream would change every run that is resumed with a newer version."""
    masks = masks_for(0, 0, range(4), 4, MaskSpec((8, 8)))
    assert masks.sum(axis=2).tolist() == [[29, 0], [12, 19], [0, 12], [0, 0]]


def test_every_place_is_masked_equally_often() -> None:
    share = np.mean(
        [(masks_for(0, s, [0, 9], 10, MaskSpec((8, 8))).any(axis=2)) for s in range(300)], axis=0
    )
    assert share == pytest.approx(np.full((2, 2), 0.5), abs=0.12)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_extremes(probability: float) -> None:
    masks = masks_for(0, 0, range(6), 6, MaskSpec((7, 5), probability))
    assert masks.any(axis=2).mean() == probability
    assert not masks.all(axis=2).any()


def test_an_index_outside_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 0 to 3"):
        masks_for(0, 0, [4], 4, MaskSpec((8, 8)))
    assert masks_for(0, 0, [], 4, MaskSpec((8, 8))).shape == (0, 2, 64)


def test_one_block_covers_at_most_half_the_grid() -> None:
    class Watched(random.Random):
        largest = 0.0

        def uniform(self, a: float, b: float) -> float:
            self.largest = max(self.largest, b)
            return super().uniform(a, b)

    rng = Watched(0)
    assert block_mask((9, 8), 60, rng).sum() > 32
    assert rng.largest == 32  # the reference's int(9 / 2) * 8
