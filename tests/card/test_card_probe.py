"""Copies, patches and scores without labels of models whose answers are planted."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.card import attacked as attacking
from pipeline.card.attacked import copies_of
from pipeline.card.probe import Probe, Probed, of_features, probe
from pipeline.card.sample import Sample
from pipeline.curate.threshold.attacks import ATTACKS, attack, attacked_copies
from pipeline.embed.embedders import EmbedderSpec, embedder_of, open_embedder
from pipeline.embed.forward import UNMODELLED
from pipeline.embed.run import Request, embed_set
from pipeline.embed.vectors import VectorSet
from pipeline.errors import DataError
from pipeline.evaluate.baselines import colour_vectors, pixel_vectors
from pipeline.evaluate.unlabelled import patch_smoothness, rank_me, uniformity
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import decode_image
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_backbone
from pipeline.shards.columns import image_id
from pipeline.shards.shards import open_shards
from pipeline.views.crops import resize_centre_crop
from tests.curate.images import scene, shard
from tests.data import encoded
from tests.standins import embedding_here

IMAGES = [encoded(scene(n, 60, 70)) for n in range(14)]
IDS = [bytes.fromhex(image_id(image)) for image in IMAGES]
SIDE = 32


class SmallPixels(nn.Module):
    """[B, C, S, S] -> [B, 64 C]: tells every image from every other one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)


class Constant(nn.Module):
    """[B, C, S, S] -> [B, 5]: the same of all images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(x), 5)


def spec_of(network: Callable[[], nn.Module]) -> EmbedderSpec:
    name = network.__name__  # type: ignore[attr-defined]
    return EmbedderSpec("backbone", name, name, load=network, image_size=SIDE, batch_size=8)


@pytest.fixture
def asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[EmbedderSpec, tuple[str, ...]], Probe]:
    """Embeds the images by a model, in two files, and gives what is to be asked of it."""
    embedding_here(monkeypatch)
    shard(tmp_path / "pile" / "a.parquet", IMAGES[:9], group=3)
    shard(tmp_path / "pile" / "b.parquet", IMAGES[9:], group=3)

    def ask(spec: EmbedderSpec, outputs: tuple[str, ...] = ("cls",)) -> Probe:
        shards = open_shards(str(tmp_path / "pile"))
        vectors = embed_set(Request(spec, shards, outputs), str(tmp_path / spec.digest)).vectors
        return Probe(vectors, spec, shards, outputs)

    return ask


Asked = Callable[..., Probe]


def values(probed: Probed, output: str = "cls") -> dict[str, float]:
    return {name: result.interval.value for name, result in probed.results[output].items()}


def prepared(image: bytes, name: str = "") -> Any:
    """An image, or an attacked copy of it, as a model is given it."""
    pixels = decode_image(image)
    copy = attack(pixels, name, bytes.fromhex(image_id(image))) if name else pixels
    return resize_centre_crop(copy, SIDE)


def recalls(vectors: Callable[[Any], torch.Tensor], centred: bool) -> dict[str, float]:
    """Recall of each attack by a plain loop over vectors of the prepared images."""
    database = vectors(np.stack([prepared(image) for image in IMAGES])).double()
    mean = database.mean(0) if centred else torch.zeros(())
    share = {}
    for name in ATTACKS:
        hits = 0
        for row, image in enumerate(IMAGES):
            copy = vectors(prepared(image, name)[None]).double()
            cosines = torch.nn.functional.cosine_similarity(database - mean, copy - mean)
            hits += int(cosines.argmax()) == row
        share[name] = hits / len(IMAGES)
    return share


def test_a_model_that_tells_images_apart_finds_all_equal_copies(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacking, "attacked_copies", lambda pixels, _: [pixels] * 10)
    answers = values(probe(asked(spec_of(SmallPixels))))
    assert answers["copies_recall1"] == answers["copies_map"] == 1.0
    assert answers["alignment"] == pytest.approx(0, abs=1e-9)


def test_a_model_that_says_the_same_of_all_finds_none_and_has_no_spread(asked: Asked) -> None:
    answers = values(probe(asked(spec_of(Constant))))
    assert answers["copies_recall1"] <= 1 / len(IMAGES)
    assert answers["copies_map"] <= 1 / len(IMAGES)
    assert answers["alignment"] == answers["feature_std"] == answers["effective_rank"] == 0
    assert answers["rank_me"] == pytest.approx(1, abs=1e-4)
    assert answers["uniformity"] == pytest.approx(0, abs=1e-9)
    assert "patch_smoothness" not in answers


def test_copies_are_looked_for_as_a_loop_does(asked: Asked) -> None:
    outputs = ("cls", *UNMODELLED)
    probed = probe(asked(spec_of(SmallPixels), outputs))
    mean, std = (torch.tensor(x)[:, None, None] for x in (EmbedderSpec().mean, EmbedderSpec().std))

    def by_network(images: Any) -> torch.Tensor:
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        return SmallPixels()((x - mean) / std)

    expected = {
        "cls": recalls(by_network, False),
        "pixels": recalls(pixel_vectors, True),
        "colours": recalls(colour_vectors, False),
    }
    for output in outputs:
        result = probed.results[output]["copies_recall1"]
        assert result.details["attacks"] == pytest.approx(expected[output])
        assert result.interval.value == pytest.approx(np.mean(list(expected[output].values())))
        assert result.score is not None and result.score.ids.tolist() == [
            list(one) for one in sorted(IDS)
        ]
    assert expected["colours"]["mirror"] == 1.0 and expected["pixels"]["blur"] == 1.0
    assert set(probed.results["pixels"]) == {"copies_recall1", "copies_map"}
    assert probed.bad == 0 and probed.remarks == ()


@pytest.mark.long
def test_scores_of_stored_vectors_and_of_patches(asked: Asked, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = BackboneSpec(image_size=28, patch_size=7, width=32, depth=2, heads=2, layer_scale=1.0)
    weights = save_backbone(shape.build().eval(), shape, tmp_path / "weights")
    question = asked(embedder_of(str(weights), image_size=28, batch_size=4))
    probed = pickle.loads(pickle.dumps(probe(pickle.loads(pickle.dumps(question)))))  # as by Ray
    features = torch.from_numpy(question.vectors.read())
    answers = values(probed)
    assert answers["rank_me"] == pytest.approx(rank_me(features))
    assert answers["uniformity"] == pytest.approx(uniformity(features))
    assert question.spec is not None
    embedder = open_embedder(question.spec)
    images = [resize_centre_crop(decode_image(image), 28) for image in IMAGES]
    patches = torch.from_numpy(embedder.outputs(images, ("patches",))["patches"])
    smoothness = patch_smoothness(patches, (4, 4))
    assert answers["patch_smoothness"] == pytest.approx(float(smoothness.mean()), abs=1e-3)
    cheap = values(probe(replace(question, attacks=False)))
    assert set(answers) - set(cheap) == {"copies_recall1", "copies_map", "alignment"}
    assert set(values(probe(replace(question, groups=("copies",))))) == {
        "copies_recall1",
        "copies_map",
    }
    few = probe(replace(question, images=5)).results["cls"]
    assert few["alignment"].score is not None and few["alignment"].score.ids.tolist() == [
        list(one) for one in sorted(IDS)[:5]
    ]
    assert few["copies_map"].details["database"] == len(IMAGES)


@pytest.mark.parametrize(("rows", "images"), [(14, 64), (600, 66), (2304, 256), (1_281_167, 256)])
def test_few_images_are_not_attacked_for_longer_than_they_are_embedded(
    rows: int, images: int
) -> None:
    table = VectorSet("somewhere", (("part-00000.parquet", rows),), {})
    assert Probe(table).sample == images
    assert Probe(table, images=7).sample == 7


def test_without_images_there_are_scores_of_vectors_and_a_remark(asked: Asked) -> None:
    question = asked(spec_of(SmallPixels))
    probed = probe(Probe(question.vectors))
    features = torch.from_numpy(question.vectors.read())
    assert values(probed) == pytest.approx(
        {name: result.interval.value for name, result in of_features(features).items()}
    )
    assert probed.remarks == (
        "vectors were given and no images, so there is no copy detection, alignment and smoothness "
        "of patches",
    )
    assert probe(Probe(question.vectors, attacks=False)).remarks == ()


def test_an_image_that_cannot_be_decoded_again_is_counted(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(encoded: bytes, *options: Any) -> Any:
        if encoded == IMAGES[3]:
            raise BadImage("truncated", "in a test")
        return decode_image(encoded, *options)

    question = asked(spec_of(SmallPixels))
    monkeypatch.setattr(attacking, "decode_image", broken)
    probed = probe(question)
    assert probed.bad == 1
    assert probed.remarks == (
        "1 of 14 images could not be decoded a second time and are in no score of copies or "
        "patches",
    )
    score = probed.results["cls"]["copies_recall1"].score
    assert score is not None and score.ids.tolist() == [
        list(one) for one in sorted(IDS) if one != IDS[3]
    ]


def test_a_model_that_the_table_is_not_of_is_refused(asked: Asked) -> None:
    question = asked(spec_of(SmallPixels))
    with pytest.raises(DataError, match="holds vectors of SmallPixels at 32 pixels, Constant at"):
        probe(replace(question, spec=spec_of(Constant)))


def test_the_sample_is_the_same_of_tables_in_any_order(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = asked(spec_of(SmallPixels)).vectors
    shard(tmp_path / "other" / "a.parquet", [*IMAGES[::-1], IMAGES[4]], group=4)
    monkeypatch.setattr("pipeline.embed.units.UNIT_IMAGES", 4)
    shards = open_shards(str(tmp_path / "other"))
    other = embed_set(Request(spec_of(SmallPixels), shards), str(tmp_path / "v")).vectors
    assert other.rows == 15 and len(other.parts) == 4
    samples = [Sample.of(one, 20) for one in (table, other)]
    assert all(len(sample) == 14 for sample in samples)  # each image once
    np.testing.assert_array_equal(samples[0].ids, samples[1].ids)
    assert [bytes(one) for one in samples[0].digests] == sorted(IDS)
    one, same = (s.read(v) for s, v in zip(samples, (table, other), strict=True))
    np.testing.assert_allclose(one, same, atol=1e-6)
    by_id = dict(zip(table.ids().tolist(), table.read(), strict=True))
    for number in (0, 5, 13):
        np.testing.assert_array_equal(one[number], by_id[samples[0].ids[number].decode()])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_images_of_any_channels_are_attacked(channels: int) -> None:
    rgb = scene(3, 50, 60)
    pixels = rgb[..., np.arange(channels) % 3]
    copies = copies_of(pixels, IDS[0])
    assert len(copies) == len(ATTACKS)
    expected = attacked_copies(rgb, IDS[0])[1:]
    for copy, rgb_copy in zip(copies, expected, strict=True):
        assert copy.dtype == np.uint8 and copy.shape == (*rgb_copy.shape[:2], channels)
        if channels % 3 == 0:
            np.testing.assert_array_equal(copy[..., :3], rgb_copy)
            np.testing.assert_array_equal(copy[..., -3:], rgb_copy)
