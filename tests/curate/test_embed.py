"""Vectors against the models themselves, called by hand."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.curate.embed import embed as module
from pipeline.curate.embed.embed import embed, embed_file
from pipeline.curate.images.fingerprint import Decoding, fingerprint
from pipeline.curate.rows.tables import matrix
from pipeline.curate.steps.steps import Output, Steps
from pipeline.embed import embedders
from pipeline.embed.embedders import EmbedderSpec, embedder_of, open_embedder
from pipeline.embed.load import digest_of
from pipeline.embed.onnx import files as onnx_files
from pipeline.embed.onnx.files import external_files, files_of
from pipeline.errors import DataError, PipelineError
from pipeline.evaluate.features import embed as features_of
from pipeline.images.decode import decode_image
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.vit import BackboneSpec
from pipeline.model.weights import save_backbone, save_huggingface
from pipeline.views.crops import resize_centre_crop
from tests.curate.images import inputs_of, result, scene, shard
from tests.data import encoded
from tests.standins import run_here

SPEC = BackboneSpec(image_size=28, width=64, depth=2, heads=1, registers=2)
MEAN, STD = embedders.MEAN, embedders.STD


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return SPEC.build().eval()


def by_hand(network, images, size=28):
    pixels = np.stack([resize_centre_crop(decode_image(image), size) for image in images])
    features = features_of(network, [pixels], MEAN, STD).double().numpy()
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def vectors_of(folder):
    table = pq.read_table(Path(folder) / "00000.parquet")
    dim = table.schema.field("vector").type.list_size
    return table.column("row").to_pylist(), matrix(table.column("vector"), dim)


IMAGES = [encoded(scene(n, 40 + n, 50)) for n in range(7)]


@pytest.mark.long
@pytest.mark.parametrize("form", ["ours", "huggingface", "pth"])
def test_weights_in_every_form_give_their_features(tmp_path, backbone, form, monkeypatch):
    if form == "ours":
        path = save_backbone(backbone, SPEC, tmp_path / "w")
    elif form == "huggingface":
        path = save_huggingface(backbone, SPEC, tmp_path / "w", Preprocessing(28, MEAN, STD))
    else:
        path = tmp_path / "w.pth"
        torch.save(backbone.state_dict(), path)
    shard(tmp_path / "in" / "a.parquet", [*IMAGES[:3], b"broken", *IMAGES[3:]], group=3)
    file = inputs_of(tmp_path / "in").files[0]
    spec = embedder_of(str(path), batch_size=2)
    account = embed_file(Output(str(tmp_path / "out"), file.name), file, spec)
    rows, vectors = vectors_of(tmp_path / "out")
    assert rows == [0, 1, 2, 4, 5, 6, 7] and account["dim"] == 64 and account["rows"] == 7
    np.testing.assert_allclose(vectors, by_hand(backbone, IMAGES), atol=1e-3)
    first = (tmp_path / "out" / "00000.parquet").read_bytes()
    monkeypatch.setattr(module, "DECODED", 2)  # a group of three is decoded in two parts
    embed_file(Output(str(tmp_path / "out"), file.name), file, spec)
    assert (tmp_path / "out" / "00000.parquet").read_bytes() == first


def test_only_rows_that_are_alive(tmp_path, backbone, monkeypatch):
    run_here(monkeypatch)
    save_backbone(backbone, SPEC, tmp_path / "w")
    shard(tmp_path / "in" / "a.parquet", IMAGES, group=2)
    inputs = inputs_of(tmp_path / "in")
    exact = tmp_path / "exact"
    exact.mkdir()
    import pyarrow as pa

    keepers = pa.table(
        {"row": [0, 1, 2, 5], "keeper": [0, 0, 2, 5], "method": ["", "bytes", "", ""]}
    )
    pq.write_table(keepers, exact / "00000.parquet")
    spec = embedder_of(str(tmp_path / "w"))
    steps, decoding = Steps(tmp_path / "out"), Decoding()
    vectors = embed(steps, "embed", inputs, spec, result(""), decoding, result(exact)).vectors
    assert (vectors.dim, vectors.column, vectors.views, vectors.names) == (
        64,
        "vector",
        False,
        ("00000",),
    )
    rows, embedded = vectors_of(vectors.folder)
    assert rows == [0, 2, 5] and steps.done[0].accounts[0]["rows"] == 3
    np.testing.assert_allclose(embedded, by_hand(backbone, [IMAGES[i] for i in rows]), atol=1e-3)


def test_descriptors_are_the_fingerprints(tmp_path, monkeypatch):
    run_here(monkeypatch)
    shard(tmp_path / "in" / "a.parquet", IMAGES)
    inputs, steps = inputs_of(tmp_path / "in"), Steps(tmp_path / "out")
    prints = fingerprint(steps, inputs, Decoding(), "sets/val")
    vectors = embed(steps, "x", inputs, EmbedderSpec(), prints, Decoding()).vectors
    assert vectors.folder == str(tmp_path / "out" / "sets" / "val") and vectors.views
    assert (vectors.column, vectors.dim) == ("descriptor", 143) and vectors.key == prints.key
    assert [step.name for step in steps.done] == ["sets/val"]


def loaded(network):
    return network


def test_what_cannot_be_used_is_said(tmp_path):
    with pytest.raises(PipelineError, match="there is no"):
        embedder_of(str(tmp_path / "nothing"))
    spec = EmbedderSpec("backbone", "nan", "1", load=partial(loaded, Nan()), image_size=8)
    with pytest.raises(DataError, match="not finite"):
        open_embedder(spec)
    (tmp_path / "a").write_bytes(b"1")
    before = digest_of(tmp_path)
    (tmp_path / "a").write_bytes(b"2")
    assert digest_of(tmp_path) != before


class Nan(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * torch.nan


# ---- ONNX


def onnx_file(path, kind="float", last=False, size=(16, 16), batch="N", metadata=None, rank=2):
    """A model that gives the mean of each channel in each of four quarters."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    h = onnx.helper
    types = {"float": 1, "uint8": 2, "float16": 10}
    shape = [batch, *size, 3] if last else [batch, 3, *size]
    nodes = [h.make_node("Cast", ["x"], ["wide"], to=1)]
    turned = "wide"
    if last:
        nodes.append(h.make_node("Transpose", ["wide"], ["first"], perm=[0, 3, 1, 2]))
        turned = "first"
    nodes.append(
        h.make_node("AveragePool", [turned], ["pooled"], kernel_shape=[8, 8], strides=[8, 8])
    )
    nodes.append(h.make_node("Flatten", ["pooled"], ["flat"]))
    out, width = "flat", [batch, 12]
    if rank == 3:
        axes = h.make_tensor("axes", 7, [1], [1])
        nodes.append(h.make_node("Unsqueeze", ["flat", "axes"], ["tokens"]))
        out, width = "tokens", [batch, 1, 12]
    graph = h.make_graph(
        nodes,
        "quarters",
        [h.make_tensor_value_info("x", types[kind], shape)],
        [h.make_tensor_value_info(out, 1, width)],
        [axes] if rank == 3 else [],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    for key, value in (metadata or {}).items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "uint8", "last": True},
        {"kind": "float16", "size": ("H", "W")},
        {"batch": 4, "rank": 3},
        {"metadata": {"mean": "[0, 0, 0]", "std": "[1, 1, 1]"}},
    ],
)
def test_onnx_takes_what_its_signature_says(tmp_path, options):
    path = onnx_file(tmp_path / "m.onnx", **options)
    spec = embedder_of(str(path), image_size=16 if "size" in options else None)
    shard(tmp_path / "in" / "a.parquet", IMAGES)
    embed_file(Output(str(tmp_path / "out")), inputs_of(tmp_path / "in").files[0], spec)
    rows, embedded = vectors_of(tmp_path / "out")
    assert rows == list(range(7))
    for vector, image in zip(embedded, IMAGES, strict=True):
        pixels = resize_centre_crop(decode_image(image), 16).astype(float)
        if options.get("kind") != "uint8":
            plain = "metadata" in options
            pixels = pixels / 255 if plain else (pixels / 255 - MEAN) / STD
        quarters = pixels.reshape(2, 8, 2, 8, 3).mean((1, 3)).transpose(2, 0, 1).ravel()
        np.testing.assert_allclose(vector, quarters / np.linalg.norm(quarters), atol=4e-3)


def test_onnx_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    path = onnx_file(tmp_path / "m.onnx")
    with pytest.raises(DataError, match="takes images of 16 x 16 pixels"):
        open_embedder(embedder_of(str(path), image_size=32))
    wide = onnx_file(tmp_path / "w.onnx", size=(16, 24))
    with pytest.raises(DataError, match="takes x tensor"):
        open_embedder(embedder_of(str(wide)))
    odd = onnx_file(tmp_path / "o.onnx", metadata={"mean": json.dumps("grey")})
    with pytest.raises(DataError, match="metadata mean"):
        open_embedder(embedder_of(str(odd)))
    (tmp_path / "t.onnx").write_bytes(b"text")
    with pytest.raises(DataError, match="cannot be opened"):
        open_embedder(embedder_of(str(tmp_path / "t.onnx")))
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DataError, match="needs the package onnxruntime"):
        open_embedder(embedder_of(str(path), batch_size=3))


def external(path, name="weights/m.data", seed=0):
    """A model whose weights lie beside it."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    h = onnx.helper
    values = np.random.default_rng(seed).normal(size=(3, 64)).astype(np.float32)
    graph = h.make_graph(
        [
            h.make_node("GlobalAveragePool", ["x"], ["mean"]),
            h.make_node("Flatten", ["mean"], ["flat"]),
            h.make_node("MatMul", ["flat", "w"], ["y"]),
        ],
        "m",
        [h.make_tensor_value_info("x", 1, ["N", 3, 8, 8])],
        [h.make_tensor_value_info("y", 1, ["N", 64])],
        [onnx.numpy_helper.from_array(values, "w")],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
    (path.parent / name).unlink(missing_ok=True)  # onnx would append to it
    kept = {"save_as_external_data": True, "location": name, "size_threshold": 0}
    onnx.save(model, str(path), **kept)
    return path


def test_weights_beside_an_onnx_model_are_part_of_it(tmp_path):
    path = external(tmp_path / "m.onnx")
    assert external_files(path.read_bytes()) == ("weights/m.data",)
    assert external_files(onnx_file(tmp_path / "whole.onnx").read_bytes()) == ()
    before = files_of(str(path)).digest
    assert files_of(str(external(tmp_path / "m.onnx"))).digest == before
    model = path.read_bytes()
    assert files_of(str(external(tmp_path / "m.onnx", seed=1))).digest != before
    assert path.read_bytes() == model  # only the file beside it says the difference
    (tmp_path / "weights" / "m.data").unlink()
    with pytest.raises(PipelineError, match=r"m\.data, which holds weights of"):
        embedder_of(str(path))


def test_onnx_models_that_lead_elsewhere_or_are_none(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = external(tmp_path / "m.onnx")
    model = onnx.load(str(path), load_external_data=False)
    for bad in ("/etc/passwd", "../m.data"):
        model.graph.initializer[0].external_data[0].value = bad
        with pytest.raises(DataError, match="not in its folder"):
            external_files(model.SerializeToString())
    for content in (b"no model", b"\x3a\xff\xff\xff\xff\x0f", b"\x3b"):
        with pytest.raises(DataError, match="no ONNX model"):
            external_files(content, "x")


@pytest.mark.parametrize("broken", [False, True])
def test_a_model_that_another_worker_fetched_meanwhile_stays(tmp_path, monkeypatch, broken):
    """The other one is through while this one still downloads, and has the model open."""
    monkeypatch.setattr(onnx_files.tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    (tmp_path / "m.onnx").write_bytes(b"")  # no fields, and none beside it
    place, folder = f"file://{tmp_path}/m.onnx", tmp_path / "node" / "raydino-models" / "d"
    if broken:
        folder.mkdir(parents=True)
    download, seen = onnx_files.download, []

    def slow(*arguments):
        if not seen:
            seen.append("")  # the other worker's download is not slow
            seen.append(onnx_files.on_this_node(place, "d"))
            seen.append((folder / "m.onnx").stat().st_ino)
        download(*arguments)

    monkeypatch.setattr(onnx_files, "download", slow)
    assert onnx_files.on_this_node(place, "d") == seen[1] == str(folder / "m.onnx")
    assert (folder / "m.onnx").stat().st_ino == seen[2]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["d", "d.lock"]


def test_an_onnx_model_at_a_uri_is_copied_once(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files.tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    path = external(tmp_path / "there" / "m.onnx")
    local = embedder_of(str(path))
    spec = embedder_of(f"file://{path}")
    assert spec.settings == local.settings and spec.path == f"file://{path}"
    image = scene(1, 8, 8)[None]
    expected = open_embedder(local).outputs(image)["cls"]
    embedders._open.clear()
    np.testing.assert_array_equal(open_embedder(spec).outputs(image)["cls"], expected)
    copies = sorted(p.name for p in (tmp_path / "node").rglob("*") if p.is_file())
    assert copies == [f"{spec.digest}.lock", "m.data", "m.onnx"]
    (tmp_path / "there" / "weights" / "m.data").unlink()  # a copy is not fetched again
    embedders._open.clear()
    np.testing.assert_array_equal(open_embedder(spec).outputs(image)["cls"], expected)
    with pytest.raises(PipelineError, match=r"at a URI, name a run folder or a \.onnx file"):
        embedder_of("file:///somewhere/weights.pth")
