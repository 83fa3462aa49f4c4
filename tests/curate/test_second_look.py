"""Pictures that are alike: copies show the same, others differ somewhere."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from pipeline.curate.images.descriptor import describe, similarity
from pipeline.curate.images.fingerprint import Decoding
from pipeline.curate.look.forms import form_of_encoded, forms_at, kept_form, opened_form
from pipeline.curate.look.second_look import SIDES, form_of, second_look
from pipeline.curate.rows.tables import POOL, Inputs
from pipeline.curate.threshold.attacks import ATTACKS, attack
from pipeline.images.decode import decode_image
from pipeline.images.value_range import FULL
from pipeline.shards.shards import open_shards
from tests.curate.images import scene, shard
from tests.curate.kinds import KINDS
from tests.data import encoded

LOST = 1  # of a kind


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def test_forms_are_squares_of_four_sizes_and_survive_storage():
    for longest, side in ((8, 64), (48, 64), (100, 128), (300, 256), (400, 512), (4000, 512)):
        form = form_of(scene(1, longest // 2, longest))
        assert form.shape == (side, side, 3) and side in SIDES
        stored = opened_form(kept_form(form))
        assert np.abs(stored.astype(int) - form).mean() < 3
    grey = form_of_encoded(encoded(Image.fromarray(scene(1)).convert("L")), Decoding(1), FULL)
    assert np.ptp(opened_form(grey), -1).max() <= 2
    assert form_of_encoded(b"broken", Decoding(), FULL) == b""


def test_images_of_12_bits_are_looked_at_with_the_range_of_their_set(tmp_path):
    """In all of 16 bits they are 16 greys, in which a fine pattern is not to be seen."""
    ramp = np.linspace(0, 4095, 200)[:, None].repeat(200, 1)
    truth = []
    for n in range(2):
        values = ramp.copy()
        values[60:100, 60 + 40 * n : 90 + 40 * n] += 200  # below one of 16 greys, where it falls
        truth.append(values.clip(0, 4095))
    deep = [encoded(Image.fromarray(values.astype(np.uint16))) for values in truth]
    shard(tmp_path / "a.parquet", deep)
    shards = replace(open_shards(str(tmp_path)), value_range=(0.0, 4095.0))
    (file,) = Inputs.of([("pool", POOL, shards)]).files
    forms = [opened_form(form) for _, form in forms_at(file, np.arange(2), Decoding(1))]
    for form, values in zip(forms, truth, strict=True):
        expected = form_of(np.repeat((values / 4095 * 255).round()[..., None], 3, 2).astype("u1"))
        assert np.abs(form.astype(int) - expected).mean() < 1
        assert len(np.unique(form)) > 200
    assert not second_look(*forms).same


@pytest.mark.long
@pytest.mark.parametrize(("each", "looks"), [(10, 3), pytest.param(50, 12, marks=pytest.mark.slow)])
def test_pictures_that_differ_in_one_place_are_told_apart(each, looks):
    """Of each kind the pairs that are most alike, which the vectors take for copies."""
    passed: dict[str, list[tuple[int, int]]] = {}
    for number, (name, make) in enumerate(KINDS.items()):
        images = [np.asarray(x) for x in make(np.random.default_rng([9, number]), each)]
        described = [describe(image) for image in images]
        full, crops = (np.stack(part) for part in zip(*described, strict=True))
        i, j = np.triu_indices(each, 1)
        order = np.argsort(-similarity(full[i], crops[i], full[j], crops[j], 0.06))[:looks]
        forms = {k: form_of(images[k]) for k in {*i[order].tolist(), *j[order].tolist()}}
        pairs = zip(i[order].tolist(), j[order].tolist(), strict=True)
        passed[name] = [(a, b) for a, b in pairs if second_look(forms[a], forms[b]).same]
    assert {name: pairs for name, pairs in passed.items() if len(pairs) > LOST} == {}


def test_the_place_where_they_differ_is_told():
    image = Image.fromarray(scene(3, 240, 320))
    other = image.copy()
    ImageDraw.Draw(other).text((240, 30), "8", fill="white", font_size=24)
    verdict = second_look(form_of(np.asarray(image)), form_of(np.asarray(other)))
    x, y = verdict.place
    assert not verdict.same and verdict.reason == "differ"
    assert abs(320 * x - 247) < 12 and abs(240 * y - 45) < 12
    mirrored = second_look(form_of(np.asarray(image)), form_of(np.asarray(ImageOps.mirror(other))))
    assert not mirrored.same and abs(320 * mirrored.place[0] - (320 - 247)) < 12


def test_copies_of_drawings_and_documents_show_the_same():
    """Compressed, smaller, mirrored: also of what is no photo."""
    failed = []
    for number, name in enumerate(("documents", "plates", "price_tags", "maps", "screenshots")):
        (image,) = KINDS[name](np.random.default_rng([4, number]), 1)
        half = image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC)
        for what, copy in (
            ("jpeg", jpeg(image, 70)),
            ("mirror", ImageOps.mirror(image)),
            ("half", half),
        ):
            if not second_look(form_of(np.asarray(image)), form_of(np.asarray(copy))).same:
                failed.append((name, what))
    assert failed == []


def test_small_images_are_looked_at_as_they_are():
    """32 pixels: a compressed, brighter or mirrored copy passes, another picture does not."""
    for seed in range(6):
        image = Image.fromarray(scene(seed, 32, 32))
        form = form_of(np.asarray(image))
        brighter = ImageEnhance.Brightness(image).enhance(1.2)
        for copy in (jpeg(image, 80), brighter, ImageOps.mirror(image)):
            assert second_look(form, form_of(np.asarray(copy))).same
        changed = np.asarray(image).copy()
        changed[10:16, 12:18] = 255 - changed[10:16, 12:18]
        assert not second_look(form, form_of(changed)).same


def test_colour_is_content_but_a_grey_copy_is_a_copy():
    cup, other = (np.asarray(x) for x in list(KINDS["products"](np.random.default_rng(1), 12))[:2])
    verdict = second_look(form_of(cup), form_of(other))
    assert not verdict.same and verdict.reason in ("colour", "differ")
    grey = np.asarray(Image.fromarray(scene(5)).convert("L").convert("RGB"))
    assert second_look(form_of(scene(5)), form_of(grey)).same


@pytest.mark.slow
def test_attacked_photos_show_the_same(shared):
    """Nine attacks on photos: nearly all pass; other photos never do."""
    files = sorted((shared / "data" / "imagenet-samples").glob("*.JPEG"))[7::50][:20]
    photos = [decode_image(file.read_bytes()) for file in files]
    passed = {
        name: sum(
            second_look(form_of(photo), form_of(attack(photo, name, bytes([n]) * 16))).same
            for n, photo in enumerate(photos)
        )
        for name in ATTACKS
    }
    assert sum(passed.values()) >= 0.95 * 9 * len(photos), passed
    assert min(passed.values()) >= 0.75 * len(photos), passed
    pairs = pairwise(photos)
    assert not any(second_look(form_of(a), form_of(b)).same for a, b in pairs)
