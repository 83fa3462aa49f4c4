"""The threshold against distributions that are known, and real photos with planted copies."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pipeline.curate import calibrate as module
from pipeline.curate import exact_copies, fingerprint, threshold
from pipeline.curate.attacks import ATTACKS, attack
from pipeline.curate.calibrate import calibrate, copies_of, picture
from pipeline.curate.descriptor import describe
from pipeline.curate.embedders import EmbedderSpec
from pipeline.curate.exact import unit_half
from pipeline.curate.threshold import Attacked, Calibration, measure_threshold, tail_threshold
from pipeline.data.decode import decode_image
from tests.curate.images import Here, encoded, inputs_of, scene, shard


def test_tail_of_an_exponential_is_found_by_the_fit():
    """Similarities with an exponential tail: the quantile of any rate is known."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = np.sort(0.3 + rng.exponential(0.02, 200_000)).astype(np.float32)
        counted, extrapolated = tail_threshold(x, 2e-3)
        assert not extrapolated and abs(counted - (0.3 + 0.02 * math.log(500))) < 0.003
        fitted, extrapolated = tail_threshold(x, 1e-6)
        assert extrapolated and abs(fitted - (0.3 + 0.02 * math.log(1e6))) < 0.03
        # a few pairs that are copies after all move it little
        spoilt = np.sort(np.concatenate([x, np.full(20, 0.99, np.float32)]))
        assert abs(tail_threshold(spoilt, 1e-6)[0] - fitted) < 0.04


def plain_sample(images: int, dim: int = 64, noise: float = 0.3, seed: int = 0) -> Attacked:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(images, 1, dim))
    copies = first + noise * rng.normal(size=(images, len(ATTACKS), dim))
    pictures = rng.integers(0, 256, (images, 64, 64)).astype(np.uint8)
    return Attacked(unit_half(np.concatenate([first, copies], 1)), None, pictures)


def test_recall_and_rate_are_counted_on_the_other_half(monkeypatch):
    monkeypatch.setattr(threshold, "same_picture", lambda a, b: False)
    sample = plain_sample(100)
    found = measure_threshold(sample, 2e-2)
    other = sample.vectors[1::2].astype(np.float64)
    hits = [
        [float(a @ c) > found.threshold for c in copies]
        for a, copies in zip(other[:, 0], other[:, 1:], strict=True)
    ]
    wrong = [
        float(a @ c) > found.threshold
        for i, a in enumerate(other[:, 0])
        for j, copies in enumerate(other)
        for c in copies
        if i != j
    ]
    assert found.recall == pytest.approx(np.mean(hits)) and found.recall > 0.99
    assert found.reached == pytest.approx(np.mean(wrong), abs=1e-9) and 0.01 < found.reached < 0.03
    assert found.negatives == len(wrong) == 10 * 50 * 49 and not found.extrapolated
    assert list(found.recalls) == list(ATTACKS) and found.penalty == 0
    again = Calibration.of_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    _, recalls, rates = zip(*found.curve, strict=True)
    assert list(recalls) == sorted(recalls, reverse=True) and rates[-1] == 0


@pytest.mark.parametrize("images", [0, 1, 2, 5, 59])
def test_few_images_give_a_stated_default(images):
    found = measure_threshold(plain_sample(images), 1e-6)
    assert found.threshold == threshold.DEFAULT_PLAIN and "too few" in found.warning
    assert json.loads(json.dumps(found.to_json()))["recall"] is None
    assert math.isnan(Calibration.of_json(found.to_json()).recall)


def test_all_images_equal(monkeypatch):
    monkeypatch.setattr(threshold, "same_picture", lambda a, b: (a == b).all())
    monkeypatch.setattr(threshold, "LOOKED_AT", 60)
    one = plain_sample(1)
    pictures = np.repeat(picture(scene(0))[None], 60, 0)
    found = measure_threshold(Attacked(np.repeat(one.vectors, 60, 0), None, pictures), 1e-6)
    assert 0 < found.threshold <= threshold.HIGHEST and found.negatives == 0
    assert "copies of each other" in found.warning and found.recall >= 0


def attacked(images: list, ids: list[bytes]) -> Attacked:
    vectors, crops, pictures = [], [], []
    for rgb, name in zip(images, ids, strict=True):
        copies = copies_of(rgb, name)
        full, views = zip(*map(describe, copies), strict=True)
        vectors.append(np.stack(full))
        crops.append(np.stack(views))
        pictures.append(picture(copies[0]))
    return Attacked(np.stack(vectors), np.stack(crops), np.stack(pictures))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_copies_in_the_sample_hardly_move_the_threshold(shared, seed):
    """200 photos, a tenth of which are then attacked copies of others."""
    files = sorted((shared / "data" / "imagenet-samples").glob("*.JPEG"))[seed::5][:200]
    photos = [copies_of(decode_image(file.read_bytes()), bytes(16))[0] for file in files]
    ids = [bytes([n]) * 16 for n in range(200)]
    clean = measure_threshold(attacked(photos, ids), 1e-6)
    names = list(ATTACKS)
    for n in range(20):  # the same half, so that they meet
        photos[100 + 2 * n] = attack(photos[2 * n], names[n % 9], ids[n])
    dirty = measure_threshold(attacked(photos, ids), 1e-6)
    assert dirty.copies - clean.copies >= 17
    assert abs(dirty.threshold - clean.threshold) < 0.03
    assert dirty.recall > clean.recall - 0.03 and clean.recall > 0.85


def run(tmp_path, images, name, backwards=False, count=60, **options):
    where = Here(backwards)
    for part in (module, fingerprint, exact_copies):
        part.run_step = where
    for n in range(0, max(1, len(images)), 20):
        shard(tmp_path / name / f"{n:03d}.parquet", images[n : n + 20])
    inputs = inputs_of(tmp_path / name)
    prints = fingerprint.fingerprint(tmp_path / f"{name}-out", inputs)
    alive = exact_copies.collapse(tmp_path / f"{name}-out", inputs, prints)
    return calibrate(
        tmp_path / f"{name}-out", inputs, prints, alive, EmbedderSpec(), images=count, **options
    )[0]


@pytest.fixture
def steps(monkeypatch):
    for part in (module, fingerprint, exact_copies):
        monkeypatch.setattr(part, "run_step", part.run_step)


def test_the_step_gives_the_same_for_any_order_of_rows(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(threshold, "PATIENCE", 5)
    images = [encoded(scene(n, 32, 40), "JPEG") for n in range(66)] + [b"", b"broken"]
    one = run(tmp_path, images, "one")
    order = np.random.default_rng(0).permutation(len(images))
    two = run(tmp_path, [images[i] for i in order], "two", backwards=True)
    assert one == two and one.images == 60 and one.extrapolated and "extrapolated" in one.warning
    assert 0.3 < one.threshold < 0.995 and one.recall > 0.5


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_step_of_few_images(tmp_path, steps, images):
    files = [encoded(scene(n)) for n in range(images)] + [b"broken"]
    found = run(tmp_path, files, "few")
    assert found.images == images and found.threshold == threshold.DEFAULT_VIEWS and found.warning
