"""The stage of a whole chain, a run folder in a bucket, and real photographs by a real network."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config.load import load
from pipeline.context import Context
from pipeline.embed.embedders import embedder_of, open_embedder
from pipeline.embed.vectors import VectorSet
from pipeline.errors import PipelineError
from pipeline.images.decode import decode_image
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_backbone
from pipeline.search import open_search
from pipeline.search.model import model_of
from pipeline.stages import search
from pipeline.storage.places import resolve_uri
from pipeline.storage.run_folder import RunFolder, write_json
from pipeline.storage.transfer import read_bytes
from tests.curate.images import scene
from tests.data import encoded
from tests.s3 import S3
from tests.search.tables import write_decisions, write_shard, write_vectors


class Notes:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.text = ""

    def artifact(self, path: Path) -> None:
        self.files.append(path.name)

    def note(self, text: str) -> None:
        self.text = text


def scenes(run: Path, count: int = 16) -> VectorSet:
    write_shard(run / "shards.parquet", [encoded(scene(seed)) for seed in range(count)])
    return write_vectors(run / "vectors", run / "shards.parquet", embedder_of("descriptor"))


def test_a_chain_shows_images_at_even_steps_through_the_ids(tmp_path: Path) -> None:
    vectors = scenes(tmp_path / "photos")
    arguments = [f"run.folder={tmp_path}", "run.name=photos", "search.images=4", "search.k=3"]
    context, notes = Context(load(arguments), RunFolder.of(str(tmp_path), "photos")), Notes()
    first = search.key(context)
    result = search.run(context, notes)
    assert search.intact(context) and notes.files == ["search.html"]
    rows = pq.read_table(tmp_path / "photos/search/neighbours.parquet").to_pylist()
    ids = sorted(vectors.ids().tolist())
    assert list(dict.fromkeys(row["query"] for row in rows)) == [ids[n] for n in (0, 4, 8, 12)]
    assert len(rows) == 12 and all(row["query"] != row["image_id"] for row in rows)
    labels = dict(zip(vectors.ids().tolist(), vectors.labels().tolist(), strict=True))
    same = sum(labels[row["query"]] == row["label"] for row in rows)
    assert f"{same} of 12 neighbours have the label of their image" in notes.text
    assert result["text"] == notes.text and result["page"].endswith("photos/search/search.html")
    page = Path(result["page"]).read_text()
    assert page.count("data:image/jpeg") == 4 * 4 and "4 images at even steps" in page
    (tmp_path / "photos/search/search.html").unlink()
    assert not search.intact(context)

    mark = tmp_path / "photos/vectors/_vectors.json"  # other vectors: the stage runs again
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"key": "others"}))
    others = search.key(context)
    assert others != first

    # curated, and curated again, here or in the run that is named: the page shows that
    write_decisions(tmp_path / "photos", [])
    keys = [first, others, search.key(context)]
    write_json(tmp_path / "photos/curate/_done.json", {"key": "a", "result": {"text": ""}})
    keys.append(search.key(context))
    write_decisions(tmp_path / "elsewhere", [])
    named = load([*arguments, f"search.decisions={tmp_path}/elsewhere"])
    context = Context(named, context.folder)
    keys.append(search.key(context))
    write_json(tmp_path / "elsewhere/curate/_done.json", {"key": "b", "result": {"text": ""}})
    keys.append(search.key(context))
    assert len(set(keys)) == len(keys) and search.key(context) == keys[-1]


def test_a_chain_that_cannot_search_is_refused_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, folder = scenes(tmp_path / "photos"), RunFolder.of(str(tmp_path), "other")
    mean = "search.vectors_column=mean"
    for arguments, embedding, words in (
        ([], False, "there are no finished vectors"),
        (["search.query=photo.jpg"], True, "search.query=photo.jpg, but a whole chain looks up"),
        (["search.model=runs/moved"], True, "search.model=runs/moved, but a whole chain looks up"),
        ([mean], True, "search.vectors_column=mean, but the vectors have cls"),
        ([mean, f"search.vectors={vectors.uri}"], True, "but the vectors have cls"),
    ):
        with pytest.raises(PipelineError, match=words):
            search.check(load(arguments), folder, embedding)
    search.check(load([]), folder, True)
    search.check(load([f"search.vectors={vectors.uri}"]), folder, False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PipelineError, match="needs faiss"):
        search.check(load(["search.index=ivf"]), folder, True)


def test_answers_go_into_a_run_folder_in_a_bucket(
    tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    vectors, uri = scenes(tmp_path / "photos"), f"s3://{s3.make('answers')}/runs"
    name = str(vectors.ids()[0])
    search.look_up(
        load(
            [f"run.folder={uri}", "run.name=ask", f"search.vectors={vectors.uri}"]
            + [f"search.query={name}"]
        )
    )
    folder = RunFolder.of(uri, "ask")
    assert b"data:image" in read_bytes(*resolve_uri(str(folder.at("search", "search.html"))))
    fs, path = resolve_uri(str(folder.at("search", "neighbours.parquet")))
    assert len(pq.read_table(path, filesystem=fs)) == 15


def test_the_model_computes_as_it_did_for_the_set(tmp_path: Path) -> None:
    spec = BackboneSpec(image_size=28, patch_size=14, width=24, depth=1, heads=2)
    save_backbone(spec.build().eval(), spec, tmp_path / "weights")
    write_shard(tmp_path / "shards.parquet", [encoded(scene(seed)) for seed in range(3)])
    model = embedder_of(str(tmp_path / "weights"))
    vectors = write_vectors(tmp_path / "vectors", tmp_path / "shards.parquet", model)
    assert not model_of(vectors).spec.half
    halved = replace(vectors, facts=vectors.facts | {"precision": "bfloat16"})
    assert model_of(halved).spec.half


@pytest.mark.slow
def test_a_thousand_photographs_by_a_network(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 photographs through a small random network: neighbours equal all cosines in doubles."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    spec = BackboneSpec(image_size=56, patch_size=14, width=64, depth=2, heads=2, layer_scale=1.0)
    save_backbone(spec.build().eval(), spec, tmp_path / "weights")
    files = sorted((shared / "data/imagenet-samples").glob("*.JPEG"))
    write_shard(tmp_path / "shards.parquet", [file.read_bytes() for file in files], 100)
    model = embedder_of(str(tmp_path / "weights"))
    vectors = write_vectors(tmp_path / "photos/vectors", tmp_path / "shards.parquet", model, 3)
    rows = asked(vectors, ",".join(vectors.ids()[:1000:10]))
    table = vectors.read().astype(np.float64)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    for query in range(0, 1000, 10):
        cosines = table @ table[query]
        cosines[query] = -np.inf
        order = np.argsort(-cosines, kind="stable")[:20]
        answer = rows[2 * query : 2 * query + 20]
        assert [row["image_id"] for row in answer] == vectors.ids()[order].tolist()
        similarities = [row["similarity"] for row in answer]
        np.testing.assert_allclose(similarities, cosines[order], atol=1e-6)
    # a photograph that is not in the set goes through the model of the set
    photo = np.ascontiguousarray(decode_image(files[7].read_bytes())[:, ::-1])
    (tmp_path / "mirrored.png").write_bytes(encoded(photo))
    embedder = open_embedder(model)
    vector = embedder.outputs([embedder.prepare(photo)])["cls"][0].astype(np.float64)
    order = np.argsort(-table @ (vector / np.linalg.norm(vector)), kind="stable")[:20]
    answer = asked(vectors, "mirrored.png")
    assert [row["image_id"] for row in answer] == vectors.ids()[order].tolist()


def asked(vectors: VectorSet, query: str) -> list[dict[str, Any]]:
    search.look_up(load([f"search.vectors={vectors.uri}", f"search.query={query}", "run.name=ask"]))
    return pq.read_table("runs/ask/search/neighbours.parquet").to_pylist()


def test_the_page_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = scenes(tmp_path / "runs/photos")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs/search.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(block, {})
    said = capsys.readouterr().out
    assert open_search("runs/photos").find(vectors.read()[3:4], 1)[1].tolist() == [[3]]
    assert said.startswith("(5, 10) ['" + vectors.ids()[0])  # it finds itself first
