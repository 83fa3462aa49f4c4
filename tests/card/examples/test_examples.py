"""Examples of a model: neighbours as a loop finds them, looks as the network says, kept whole."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.card.examples import nearest
from pipeline.card.examples.gathered import NEIGHBOURS, examples_of
from pipeline.card.examples.kept import (
    FILE,
    Asked,
    Examples,
    Look,
    Neighbour,
    Shown,
    read_examples,
    write_examples,
)
from pipeline.card.examples.looks import SIDE, looks_of
from pipeline.card.run import evaluate
from pipeline.embed.embedders import BACKBONE, ONNX, EmbedderSpec
from pipeline.embed.vectors import VectorSet, open_vectors
from pipeline.evaluate.pictures import token_colours
from pipeline.model.vit import BackboneSpec, VisionTransformer
from pipeline.stages.evaluate import image_of, readers_of
from pipeline.stages.evaluation import request_of
from pipeline.use.attention import attention
from tests.card.conftest import COLOURS, coloured
from tests.card.test_run import Trained
from tests.search.tables import write_table

DIM = 8


def table_of(folder: Path, vectors: Any, labels: Any, parts: int = 1) -> VectorSet:
    rows = len(vectors)
    facts = {
        "version": 1, "key": f"k{folder.name}", "model": "m", "digest": "d", "dim": DIM,
        "image_size": 32, "channels": 3, "grid": [1, 1], "outputs": ["cls"], "blocks": 4,
        "dtype": "float32", "shards": {}, "class_names": ["cat", "dog", "owl"],
    }  # fmt: skip
    known = [None if label < 0 else int(label) for label in labels]
    images = pa.table(
        {
            "image_id": [f"{folder.name}{n:031x}" for n in range(rows)],
            "source": [f"{folder.name}/{n}.jpg" for n in range(rows)],
            "label": pa.array(known, pa.int64()),
        }
    )
    write_table(folder, facts, images, np.asarray(vectors, np.float32), parts)
    return open_vectors(str(folder))


@pytest.mark.parametrize("rows", [3, 7, 1000])
def test_neighbours_are_those_of_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(nearest, "ROWS", rows)
    rng = np.random.default_rng(0)
    known, asked = rng.standard_normal((60, DIM)), rng.standard_normal((20, DIM))
    labels = rng.integers(0, 3, 60)
    reference = table_of(tmp_path / "a", known, labels, parts=3)
    queries = table_of(tmp_path / "b", asked, rng.integers(0, 3, 20))
    for one in nearest.nearest_of(reference, queries, 6, 5):
        number = int(one.query.source.split("/")[1].split(".")[0])
        cosines = [
            float(v @ asked[number] / np.linalg.norm(v) / np.linalg.norm(asked[number]))
            for v in known
        ]
        order = sorted(range(60), key=lambda n: -cosines[n])[:5]
        assert [row.source for row in one.rows] == [f"a/{n}.jpg" for n in order]
        assert one.cosines == pytest.approx([cosines[n] for n in order], abs=1e-6)
        assert [row.label for row in one.rows] == [int(labels[n]) for n in order]


def test_nobody_is_a_neighbour_of_itself(tmp_path: Path) -> None:
    vectors = np.eye(DIM)[[0, 0, 1, 2]] + 0.01
    table = table_of(tmp_path / "a", vectors, [0, 0, 1, 2])
    answered = nearest.nearest_of(table, None, 4, 10)
    for one in answered:
        assert one.query.image_id not in [row.image_id for row in one.rows]
        assert len(one.rows) == 3
    assert answered[0].cosines[0] == pytest.approx(1, abs=1e-6)


def test_images_that_are_asked_are_of_many_classes() -> None:
    labels = np.repeat(np.arange(10), 5)
    assert labels[nearest.picked(labels, 5)].tolist() == [0, 2, 4, 6, 8]
    assert set(labels[nearest.picked(labels, 12)].tolist()) == set(range(10))
    assert len(set(nearest.picked(labels, 12).tolist())) == 12
    few = nearest.picked(np.array([1, 0, -1, 1, 0, 0]), 4)
    assert few.tolist() == [1, 0, 4, 3]
    alike = nearest.picked(np.full(100, -1), 4)
    assert alike.tolist() == [12, 37, 62, 87]
    assert nearest.picked(np.zeros(0, np.int64), 4).tolist() == []


def test_examples_come_back_whole(tmp_path: Path) -> None:
    image = Shown(b"\xff\x00jpeg", "a.jpg", "cat")
    kept = Examples(
        "runs/a",
        (Asked(image, (Neighbour(image, 0.25, True), Neighbour(Shown(b"", "b"), 0.125))),),
        (Look(image, {"components": (b"before", b"after")}),),
        "at step 0",
        ("no attention",),
    )
    write_examples(kept, tmp_path)
    assert read_examples(tmp_path) == kept
    assert read_examples(tmp_path / "elsewhere") == Examples()
    (tmp_path / FILE).write_text('{"version": 0}')
    assert read_examples(tmp_path) == Examples()


SPEC = BackboneSpec(image_size=32, patch_size=8, width=16, depth=2, heads=2, registers=1)


def network(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    built = VisionTransformer(SPEC).eval()
    with torch.no_grad():
        for name, value in built.named_parameters():
            if "qkv.weight" in name:
                value.mul_(100)  # else it attends to all alike
    return built


def spec_of(seed: int) -> EmbedderSpec:
    return EmbedderSpec(BACKBONE, f"n{seed}", f"d{seed}", partial(network, seed), image_size=32)


def pixels_of(picture: bytes) -> Any:
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("RGB"))


def test_looks_are_those_of_the_networks() -> None:
    images = [coloured(name, 1, side=32) for name in COLOURS]
    looks = looks_of(spec_of(0), spec_of(1), images, 10**6)
    assert looks.remark == "" and len(looks.images) == len(looks.pictures) == 3
    mean, std = (np.array(x) for x in (spec_of(0).mean, spec_of(0).std))
    shown = np.stack([pixels_of(one)[:: SIDE // 32, :: SIDE // 32] for one in looks.images])
    x = torch.from_numpy(((shown / 255 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)
    for seed, place in ((0, 0), (1, 1)):
        with torch.no_grad():
            tokens = network(seed).forward_features(x)["x_norm_patchtokens"]
        colours = token_colours(tokens.half().float()).reshape(3, 4, 4, 3)
        for number, pictures in enumerate(looks.pictures):
            drawn = pixels_of(pictures["components"][place])[:: SIDE // 4, :: SIDE // 4] / 255
            assert np.abs(drawn - colours[number].numpy()).max() < 0.02
        heat = attention(network(seed), x).mean(1)[0]
        drawn = pixels_of(looks.pictures[0]["attention"][place]).astype(float)
        patches = drawn.sum(2).reshape(4, 32, 4, 32)[:, 12:20, :, 12:20].mean((1, 3))
        assert np.corrcoef(patches.ravel(), heat.numpy().ravel())[0, 1] > 0.8


def test_without_patches_there_are_words() -> None:
    vectors = replace(spec_of(0), kind=ONNX)
    assert "vectors only" in looks_of(vectors, vectors, [coloured("red", 1)], 10**6).remark
    assert looks_of(spec_of(0), spec_of(1), [b"no image"], 10**6).remark


@pytest.mark.usefixtures("ray_here")
def test_examples_agree_with_the_card(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    request = request_of(trained.context())
    card = evaluate(request)
    examples = examples_of(request, image_of(request), readers_of(request))
    assert {one.image.label for one in examples.asked} == set(COLOURS)
    for one in examples.asked:
        assert len(one.neighbours) == NEIGHBOURS and one.image.picture
        for near in one.neighbours:
            assert near.right == (near.image.label == one.image.label)
    assert all({"components", "attention"} == set(one.pictures) for one in examples.looks)
    assert examples.before.endswith("at step 0") and not examples.remarks
    gone = examples_of(request, image_of(request), [])
    assert gone.asked == examples.asked and gone.looks == ()
    assert gone.remarks == ("the images cannot be read",)
    # the neighbours of wrong answers are those that the card has
    tables = [open_vectors(str(tmp_path / "runs/tiny/evaluate/vectors/00-model" / what))
              for what in ("queries", "reference")]  # fmt: skip
    ids = tables[0].ids().tolist()
    for wrong in card.wrong[:5]:
        asked = tables[0].read()[[ids.index(wrong.query)]]
        asked = asked / np.linalg.norm(asked, axis=1, keepdims=True)
        rows, cosines = nearest.search(tables[1], asked, [wrong.query], 3)
        expected = wrong.neighbours[:3]
        assert cosines[0].tolist() == pytest.approx([x for _, _, x in expected], abs=1e-5)
        named = tables[1].ids()[rows[0]].tolist()
        close = np.diff(cosines[0]) < -1e-5
        assert named[0] == expected[0][0] or not close[0]


@pytest.mark.usefixtures("ray_here")
def test_without_labels_neighbours_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    request = request_of(trained.context("evaluate.queries=", "data.labels=none"))
    assert not request.labelled
    evaluate(request)
    examples = examples_of(request, image_of(request), readers_of(request))
    assert len(examples.asked) == 6 and len(examples.looks) == 4
    for one in examples.asked:
        assert one.image.label == "" and one.image.picture
        assert {near.right for near in one.neighbours} == {None}
