"""What is held out of one labelled set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluate.classifiers.split import classes_of_one, held_out


def ids_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


def counted(count: int) -> np.ndarray:
    """Ids that are numbers counted up, as of a set that hashes nothing."""
    return np.arange(count)[:, None].astype(">u8").repeat(2, 1).view(np.uint8).reshape(count, 16)


@pytest.mark.parametrize("make", [ids_of, counted])
def test_an_image_stays_on_its_side_whatever_the_order(make) -> None:
    labels, ids = np.arange(1000) % 7, make(1000)
    out = held_out(labels, ids)
    order = np.random.default_rng(1).permutation(1000)
    assert (held_out(labels[order], ids[order]) == out[order]).all()
    other = held_out(labels, ids, seed=1)
    # Two independent fifths share a twenty-fifth: 40 of 1,000, give or take 6.
    assert 15 < (out & other).sum() < 65
    assert (held_out(torch.from_numpy(labels), ids) == out).all()


@pytest.mark.parametrize("size", [2, 3, 4, 5, 9, 10, 100])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_every_class_has_images_on_both_sides(size: int, share: float) -> None:
    labels = np.repeat(np.arange(11), size)
    out = held_out(labels, ids_of(11 * size), share)
    of_class = out.reshape(11, size).sum(1)
    assert (of_class == min(max(round(share * size), 1), size - 1)).all()


def test_a_class_of_one_is_trained_with_and_a_row_without_a_label_is_not_held_out() -> None:
    labels = np.array([0, 1, 1, -1, -1, -1, -1, -1, 7])
    out = held_out(labels, ids_of(9))
    assert out.sum() == 1 and out[1:3].any()
    assert classes_of_one(labels, ids_of(9)) == 2
    assert not held_out(np.array([-1, -1]), ids_of(2)).any()
    assert not held_out(np.zeros(0, np.int64), ids_of(0)).any()


def test_copies_of_an_image_stay_together_even_with_other_labels() -> None:
    ids = np.tile(ids_of(40), (3, 1))
    labels = np.concatenate([np.arange(40) % 4, np.arange(40) % 4, (np.arange(40) + 1) % 4])
    out = held_out(labels, ids).reshape(3, 40)
    assert 0 < out.sum() < 120
    assert (out == out[0]).all()
    # Copies are one image: a class of one image in three rows has none to hold out.
    same = np.repeat(ids_of(1), 3, axis=0)
    assert not held_out(np.zeros(3, np.int64), same).any()
    assert classes_of_one(np.zeros(3, np.int64), same) == 1


def split_mix(x: int) -> int:
    """SplitMix64 in Python's own numbers; of 0 it is e220a8397b1dcdaf, as published."""
    whole = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & whole
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & whole
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & whole
    return x ^ (x >> 31)


def test_which_images_are_held_out_is_fixed() -> None:
    """Scores of two versions are compared on the same images: a change here breaks that."""
    assert split_mix(0) == 0xE220A8397B1DCDAF
    ids, hashes = ids_of(50), []
    for one in ids:
        low, high = (int.from_bytes(one[at : at + 8].tobytes(), "little") for at in (0, 8))
        hashes.append(split_mix(split_mix(split_mix(3) ^ low) ^ high))
    lowest = sorted(range(50), key=hashes.__getitem__)[:10]
    assert held_out(np.zeros(50, np.int64), ids, seed=3).nonzero()[0].tolist() == sorted(lowest)


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="share of 1 "):
        held_out(np.zeros(3, np.int64), ids_of(3), share=1.0)
    with pytest.raises(DataError, match="3 labels have ids of shape \\[2, 16\\]"):
        held_out(np.zeros(3, np.int64), ids_of(2))
