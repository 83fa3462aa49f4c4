"""The threshold against distributions that are known, and real photos with planted copies."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from pipeline.config.load import load
from pipeline.curate.embed import embed as embedding
from pipeline.curate.embed.embed import embed, embed_file
from pipeline.curate.images.descriptor import describe, similarity
from pipeline.curate.images.equal_images import equal_images
from pipeline.curate.images.fingerprint import Decoding, fingerprint
from pipeline.curate.look import forms
from pipeline.curate.look.second_look import Verdict, form_of, second_look
from pipeline.curate.rows.exact import unit_half
from pipeline.curate.steps import tasks
from pipeline.curate.steps.steps import Output, Resources, Steps
from pipeline.curate.threshold import calibrate as module
from pipeline.curate.threshold import tail, threshold
from pipeline.curate.threshold.attacks import ATTACKS, attack, attacked_copies
from pipeline.curate.threshold.calibrate import (
    SampleRows,
    Sampling,
    attack_rows,
    calibrate,
)
from pipeline.curate.threshold.tail import all_pairs, interval, tail_threshold
from pipeline.curate.threshold.threshold import Calibration, Sample, measure_threshold
from pipeline.embed import embedders
from pipeline.embed.embedders import MEAN, STD, EmbedderSpec, embedder_of, open_embedder
from pipeline.embed.load import load_weights
from pipeline.errors import ConfigError
from pipeline.evaluate.features import embed as features_of
from pipeline.images.decode import decode_image
from pipeline.model.vit import BackboneSpec
from pipeline.model.weights import save_backbone
from pipeline.shards.columns import image_id
from pipeline.views.crops import resize_centre_crop
from tests.curate.images import inputs_of, scene, shard
from tests.data import encoded
from tests.standins import run_here

DECODING = Decoding()


def unit(rng, *shape):
    return unit_half(rng.normal(size=shape).reshape(-1, shape[-1])).reshape(shape)


def test_tail_of_an_exponential_is_found_by_the_fit():
    """Similarities with an exponential tail: the quantile of any rate is known."""
    errors = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = np.sort(0.3 + rng.exponential(0.02, 2_000_000))[::-1]
        counted, extrapolated = tail_threshold(x[:20_000], len(x), 1e-3)
        assert not extrapolated and abs(counted - (0.3 + 0.02 * math.log(1e3))) < 0.003
        fitted, extrapolated = tail_threshold(x[:20_000], len(x), 1e-6)
        assert extrapolated
        # a few pairs that are copies after all move it little
        spoilt = np.concatenate([np.full(20, 0.99), x])
        assert abs(tail_threshold(spoilt[:20_000], len(x), 1e-6)[0] - fitted) < 0.03
        errors.append(fitted - (0.3 + 0.02 * math.log(1e6)))
    assert abs(np.mean(errors)) < 0.01 and max(map(abs, errors)) < 0.03


def test_weights_count_pairs_as_often_as_they_say():
    rng = np.random.default_rng(0)
    top = np.sort(rng.random(900))[::-1]
    times = rng.integers(0, 4, 900)
    again = np.repeat(top, times)
    for target in (1e-3, 0.1):
        weighted = tail_threshold(top, 10_000, target, times.astype(float))
        assert weighted == tail_threshold(again, 10_000, target)


def test_the_highest_rate_is_counted_among_the_pairs_that_are_looked_at():
    """Above it the threshold would be that of the last pair looked at, whatever the rate."""
    with pytest.raises(ConfigError, match=r"dedup\.false_positives"):
        load(["curate.preset=dedup", "dedup.false_positives=0.0011"])
    highest = load(["curate.preset=dedup", "dedup.false_positives=0.001"]).dedup.false_positives
    pairs = module.COMPARED * (module.COMPARED - 1) // 2
    ranks = np.arange(pairs, 0, -1, dtype=np.float64) / pairs  # similarities, descending
    highest_of_tail, _ = tail_threshold(ranks[: tail.TOP] * tail.HIGHEST, pairs, highest)
    assert highest_of_tail / tail.HIGHEST == pytest.approx(1 - highest, abs=2e-6)


@pytest.mark.parametrize("views", [False, True])
def test_all_pairs_are_those_of_two_loops(views):
    rng = np.random.default_rng(1)
    vectors = unit(rng, 23, 143)
    crops = unit(rng, 23, 9, 143) if views else None
    pairs = all_pairs(vectors, crops)
    expected = []
    for i in range(23):
        for j in range(i + 1, 23):
            one = slice(i, i + 1), slice(j, j + 1)
            if crops is None:
                expected.append(float(vectors[i].astype(float) @ vectors[j].astype(float)))
            else:
                a, b = one
                expected.append(similarity(vectors[a], crops[a], vectors[b], crops[b], 0.05)[0])
    np.testing.assert_allclose(pairs.at(0.05), expected, atol=1e-5)
    top, i, j = pairs.top(0.05, 7)
    assert top.tolist() == sorted(expected, reverse=True)[:7]
    order = [(a, b) for a in range(23) for b in range(a + 1, 23)]
    assert [expected[order.index(pair)] for pair in zip(i, j, strict=True)] == top.tolist()
    assert pairs.ends(np.arange(len(order)))[0].tolist() == [a for a, _ in order]


def differ(a: int, b: int) -> Verdict:
    return Verdict(False, "differ", 9.0, (0.5, 0.5))


def alike(a: int, b: int) -> Verdict:
    return Verdict(True, "", 0.0, (0.5, 0.5))


def plain_sample(images: int, dim: int = 64, noise: float = 0.3, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    first = rng.normal(size=(images, 1, dim))
    copies = first + noise * rng.normal(size=(images, len(ATTACKS), dim))
    every = np.arange(images)
    vectors = unit_half(first.reshape(-1, dim))
    return Sample(
        vectors,
        None,
        differ,
        every,
        unit_half(copies.reshape(-1, dim)).reshape(copies.shape),
        None,
    )


def test_recall_and_rate_are_those_of_the_pairs():
    sample = plain_sample(120)
    calibration = measure_threshold(sample, 5e-2)
    wide = sample.vectors.astype(np.float64)
    hits = [
        [float(wide[i] @ c) > calibration.threshold for c in sample.copies[i].astype(np.float64)]
        for i in range(1, 120, 2)
    ]
    both = [float(wide[i] @ wide[j]) for i in range(120) for j in range(i + 1, 120)]
    assert calibration.recall == pytest.approx(np.mean(hits)) and calibration.recall > 0.99
    assert calibration.negatives == len(both) == 120 * 119 / 2 and not calibration.extrapolated
    assert np.mean(np.array(both) > calibration.threshold) == pytest.approx(0.05, abs=2e-3)
    assert 0.02 < calibration.reached < 0.09  # of one half, by the threshold of the other
    assert calibration.low < calibration.threshold < calibration.high
    assert list(calibration.recalls) == list(ATTACKS) and calibration.penalty == 0
    again = Calibration.of_json(json.loads(json.dumps(calibration.to_json())))
    assert again == calibration
    assert (
        f"{calibration.low:.3f} to {calibration.high:.3f}" in calibration.line()
        and "100%" in calibration.line()
    )
    _, recalls, rates = zip(*calibration.curve, strict=True)
    assert list(recalls) == sorted(recalls, reverse=True) and rates[-1] == 0


@pytest.mark.long
def test_the_interval_holds_the_thresholds_of_other_samples():
    """Of one distribution: 30 samples of 150 images, against a sample of 3,000."""
    rng = np.random.default_rng(5)
    mean = rng.normal(size=24)

    def threshold_of(images):
        vectors = unit_half(mean * 0.4 + rng.normal(size=(images, 24)))
        pairs = all_pairs(vectors, None)
        total = len(pairs.plain)
        top, i, j = pairs.top(0.0, total // 10)
        return tail_threshold(top, total, 0.03)[0], interval(top, i, j, images, 0, 0.03)

    truth = threshold_of(3000)[0]
    samples = [threshold_of(150) for _ in range(30)]
    inside = sum(low <= truth <= high for _, (low, high) in samples)
    assert inside >= 25
    spread = np.std([threshold for threshold, _ in samples])
    widths = np.array([high - low for _, (low, high) in samples])
    assert 2 < np.median(widths) / spread < 8  # four deviations, were it exact


@pytest.mark.parametrize("images", [0, 1, 2, 5, 59])
def test_few_images_give_a_strict_threshold(images):
    calibration = measure_threshold(plain_sample(images), 1e-6)
    assert (
        calibration.threshold == threshold.STRICT_PLAIN == 0.95 and "too few" in calibration.warning
    )
    assert "strict" in calibration.warning and "strict" in calibration.line()
    assert json.loads(json.dumps(calibration.to_json()))["recall"] is None
    assert math.isnan(Calibration.of_json(calibration.to_json()).recall)


def test_all_images_equal():
    one = plain_sample(1)
    sample = Sample(
        np.repeat(one.vectors, 60, 0),
        None,
        alike,
        np.arange(60),
        np.repeat(one.copies, 60, 0),
        None,
    )
    calibration = measure_threshold(sample, 1e-6)
    assert 0 < calibration.threshold <= tail.HIGHEST and calibration.negatives == 0
    assert calibration.copies == 60 * 59 / 2
    assert "copies of each other" in calibration.warning and calibration.recall >= 0


def test_what_the_reader_must_know_is_said(monkeypatch):
    assert "are few" in measure_threshold(plain_sample(100), 1e-2).warning
    assert "extrapolated" in measure_threshold(plain_sample(100), 1e-6).warning
    close = plain_sample(100, noise=0.01)
    near = unit_half(close.vectors[:1].astype(float) + 1e-3 * close.vectors.astype(float))
    pairs = Sample(near, None, differ, close.originals, close.copies, None)
    calibration = measure_threshold(pairs, 1e-6)
    assert calibration.threshold == tail.HIGHEST and "as alike as copies" in calibration.warning
    assert calibration.undecided == 0 and "could not say" not in calibration.warning
    unclear = replace(pairs, look=lambda a, b: Verdict(False, "undecided", 0.0, (0.5, 0.5)))
    calibration = measure_threshold(unclear, 1e-6)
    assert calibration.undecided == tail.PATIENCE and calibration.copies == 0
    assert (
        f"of {tail.PATIENCE} pairs" in calibration.warning
        and "could not say" in calibration.warning
    )
    monkeypatch.setattr(tail, "LOOKED_AT", 30)
    assert "may be too high" in measure_threshold(plain_sample(100), 1e-2).warning


def attacked(images: list, ids: list[bytes]) -> Sample:
    described = [
        list(map(describe, attacked_copies(x, n))) for x, n in zip(images, ids, strict=True)
    ]
    full = np.stack([np.stack([whole for whole, _ in part]) for part in described])
    crops = np.stack([np.stack([views for _, views in part]) for part in described])
    forms = [form_of(image) for image in images]
    every = np.arange(len(images))

    def look(a: int, b: int) -> Verdict:
        return second_look(forms[a], forms[b])

    return Sample(full[:, 0], crops[:, 0], look, every, full[:, 1:], crops[:, 1:])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_copies_in_the_sample_hardly_move_the_threshold(shared, seed):
    """200 photos, a tenth of which are then attacked copies of others."""
    files = sorted((shared / "data" / "imagenet-samples").glob("*.JPEG"))[seed::5][:200]
    photos = [attacked_copies(decode_image(file.read_bytes()), bytes(16))[0] for file in files]
    ids = [bytes([n]) * 16 for n in range(200)]
    clean = measure_threshold(attacked(photos, ids), 1e-6)
    names = list(ATTACKS)
    for n in range(20):
        photos[100 + 2 * n] = attack(photos[2 * n], names[n % 9], ids[n])
    dirty = measure_threshold(attacked(photos, ids), 1e-6)
    assert dirty.copies - clean.copies >= 17
    assert abs(dirty.threshold - clean.threshold) < 0.03
    assert dirty.recall > clean.recall - 0.03 and clean.recall > 0.85


def run(*arguments, **options):
    return both(*arguments, **options)[0]


def both(tmp_path, images, name, count=60, decoding=DECODING):
    """The calibration and its step."""
    for n in range(0, max(1, len(images)), 20):
        shard(tmp_path / name / f"{n:03d}.parquet", images[n : n + 20])
    inputs, steps = inputs_of(tmp_path / name), Steps(tmp_path / f"{name}-out")
    prints = fingerprint(steps, inputs, decoding)
    equal = equal_images(steps, inputs, prints)
    embedded = embed(steps, "embed", inputs, EmbedderSpec(), prints, decoding, equal)
    sampling = Sampling(images=count)
    calibration = calibrate(steps, inputs, prints, equal, embedded, sampling, decoding)
    return calibration, steps.done[-1]


@pytest.fixture
def steps(monkeypatch):
    run_here(monkeypatch)


@pytest.mark.long
def test_the_step_gives_the_same_for_any_order_of_rows(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(tail, "LOOKED_AT", 5)
    groups_at, reads = forms.groups_at, []

    def counted(file, places):
        for group, rows, first in groups_at(file, places):
            reads.append((file.file.path, first))
            yield group, rows, first

    monkeypatch.setattr(forms, "groups_at", counted)
    images = [encoded(scene(n, 32, 40), "JPEG") for n in range(66)] + [b"", b"broken"]
    one = run(tmp_path, images, "one")
    assert len(reads) == len(set(reads)) > 0  # each is read once for all pairs
    order = np.random.default_rng(0).permutation(len(images))
    run_here(monkeypatch, seed=1)  # tasks in another order too
    two = run(tmp_path, [images[i] for i in order], "two")
    assert one == two and one.extrapolated and "extrapolated" in one.warning
    assert (one.images, one.attacked, one.negatives + one.copies) == (66, 60, 66 * 65 / 2)
    assert 0.3 < one.threshold < 0.995 and one.recall > 0.5


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_step_of_few_images(tmp_path, steps, images):
    files = [encoded(scene(n)) for n in range(images)] + [b"broken"]
    calibration = run(tmp_path, files, "few")
    assert (
        calibration.images == images
        and calibration.threshold == threshold.STRICT_VIEWS
        and calibration.warning
    )


def test_another_second_look_measures_again(tmp_path, steps, monkeypatch):
    keys = set()
    for version, channels in ((1, 3), (2, 3), (2, 4)):
        monkeypatch.setattr(module, "VERSION", version)
        keys.add(both(tmp_path, [b"broken"], "few", decoding=Decoding(channels))[1].key)
    assert len(keys) == 3


@pytest.mark.long
def test_equal_images_make_the_sample_no_smaller(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(module, "COMPARED", 10)
    images = [encoded(scene(n, 32, 40), "JPEG") for n in range(30)]
    again = [Image.open(io.BytesIO(image)) for image in images[:10]]
    pixels = [encoded(image.convert("RGB"), "PNG") for image in again]
    calibration = run(tmp_path, [*images, *pixels, *images[:1] * 600], "equal", count=10)
    assert (calibration.images, calibration.attacked) == (10, 10)


@pytest.mark.long
def test_copies_are_embedded_where_images_are(tmp_path, steps, monkeypatch):
    """On a GPU where there is one, with its CPUs, in batches; the vectors are the network's."""
    torch.manual_seed(0)
    spec = BackboneSpec(image_size=28, width=64, depth=1, heads=1, registers=0)
    network = spec.build().eval()
    embedder = embedder_of(str(save_backbone(network, spec, tmp_path / "weights")), batch_size=16)
    run_here(monkeypatch)
    nodes = [{"Alive": True, "Resources": {"CPU": 6.0, "GPU": 2.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    run, asked = tasks._run, {}

    def seen(folder, waiting, function, resources, step, total):
        asked[step] = resources
        return run(folder, waiting, function, resources, step, total)

    monkeypatch.setattr(tasks, "_run", seen)
    opened = []

    def on(spec, gpu, threads):
        opened.append((gpu, threads))
        return open_embedder(spec, False, 1)

    for part in (module, embedding):
        monkeypatch.setattr(part, "open_embedder", on)
    images = [encoded(scene(n, 40, 50), "JPEG") for n in range(9)]
    shard(tmp_path / "in" / "a.parquet", [*images, b"broken"], group=4)
    root = tmp_path / "out"
    inputs, steps = inputs_of(tmp_path / "in"), Steps(root)
    prints = fingerprint(steps, inputs, DECODING)
    equal = equal_images(steps, inputs, prints)
    embedded = embed(steps, "embed", inputs, embedder, prints, DECODING, equal)
    sampling = Sampling(images=5)
    calibration = calibrate(steps, inputs, prints, equal, embedded, sampling, DECODING)
    assert (calibration.images, calibration.attacked) == (9, 5)
    assert asked["calibrate_copies"] == asked["embed"] == Resources(3.0, 1.0)
    assert opened == [(True, 3)] * 2
    table = pq.read_table(root / "calibrate_copies" / "00000.parquet")
    by_id = {bytes.fromhex(image_id(image)): decode_image(image) for image in images}
    for name, row in zip(table["image_id"].to_pylist(), table["vectors"].to_pylist(), strict=True):
        copies = attacked_copies(by_id[name], name)[1:]
        pixels = np.stack([resize_centre_crop(copy, 28) for copy in copies])
        expected = features_of(network, [pixels], MEAN, STD).double().numpy()
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(np.array(row).reshape(9, -1), expected, atol=1e-3)


@pytest.mark.long
def test_a_model_is_opened_once_for_all_files_of_a_worker(tmp_path, monkeypatch):
    spec = BackboneSpec(image_size=28, width=64, depth=1, heads=1, registers=0)
    embedder = embedder_of(str(save_backbone(spec.build(), spec, tmp_path / "weights")))
    opened = []
    monkeypatch.setattr(embedders, "_open", {})
    counted = replace(
        embedder, load=lambda: opened.append(1) or load_weights(str(tmp_path / "weights"))
    )
    for n in range(3):
        shard(tmp_path / "in" / f"{n}.parquet", [encoded(scene(n))])
    for file in inputs_of(tmp_path / "in").files:
        embed_file(Output(str(tmp_path / "out"), file.name), file, counted)
        sample = SampleRows(file, (file.first,))
        attack_rows(Output(str(tmp_path / "copies"), file.name), sample, counted, 0, 10**8)
    assert len(opened) == 1
