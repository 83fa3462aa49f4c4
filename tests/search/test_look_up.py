"""`jobs/search.py` as a user has it: files, ids, folders and parquet in, table, page and parquet
out. The model is the descriptor, so that nothing is trained; neighbours are checked by a loop.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config.load import load
from pipeline.embed.embedders import embedder_of
from pipeline.embed.vectors import VectorSet, open_vectors
from pipeline.errors import PipelineError
from pipeline.job import main
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_backbone
from pipeline.search.decisions import Decision, Decisions
from pipeline.shards.columns import image_id
from pipeline.stages.search import look_up
from pipeline.storage.run_folder import RunFolder
from tests.curate.images import scene
from tests.data import encoded
from tests.search.tables import write_decisions, write_shard, write_table, write_vectors

IMAGES = [encoded(scene(seed)) for seed in range(24)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> VectorSet:
    """The vectors of 24 scenes in the run folder of a curated run; nobody writes there."""
    run = tmp_path_factory.mktemp("runs") / "photos"
    write_shard(run / "shards.parquet", IMAGES)
    vectors = write_vectors(run / "vectors", run / "shards.parquet", embedder_of("descriptor"))
    first, second = (str(name) for name in vectors.ids()[:2])
    decisions = [
        {"image_id": str(name), "kept": name != second, "reason": "kept", "keeper_id": None}
        for name in vectors.ids()
    ]
    decisions[1] |= {"reason": "duplicate_near", "keeper_id": first}
    write_decisions(run, decisions)
    return vectors


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    return tmp_path


def search(vectors: VectorSet, query: object, *more: str) -> list[dict[str, object]]:
    """Asks, and gives the rows of the parquet."""
    look_up(load([f"search.vectors={vectors.uri}", f"search.query={query}", "run.name=ask", *more]))
    return pq.read_table("runs/ask/search/neighbours.parquet").to_pylist()


def by_loop(vectors: VectorSet, vector: np.ndarray, own: str = "") -> list[str]:
    """Ids by falling cosine."""
    table = vectors.read("cls").astype(float)
    cosines = [row @ vector / (np.linalg.norm(row) * np.linalg.norm(vector)) for row in table]
    order = sorted(range(len(table)), key=lambda row: -cosines[row])
    return [str(vectors.ids()[row]) for row in order if str(vectors.ids()[row]) != own]


def test_an_image_of_the_set_by_the_beginning_of_its_id(
    made: VectorSet, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = str(made.ids()[7])
    rows = search(made, name[:6], "search.k=5")
    assert [row["query"] for row in rows] == [name] * 5
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["image_id"] for row in rows] == by_loop(made, made.read("cls")[7], name)[:5]
    where = dict(zip(made.ids().tolist(), made.sources(), strict=True))
    assert [row["source"] for row in rows] == [where[row["image_id"]] for row in rows]
    assert "similarity  image_id" in caplog.text and "label  decision" in caplog.text
    page = (here / "runs/ask/search/search.html").read_text()
    assert page.count("data:image/jpeg") == 6 and "24 images, cls of descriptor, exact" in page
    own = dict(zip(made.ids().tolist(), made.labels().tolist(), strict=True))
    right = [own[row["image_id"]] == own[name] for row in rows]
    frames = re.findall(r'<figure class="tile (\w+)"', page)
    assert frames == ["query", *("right" if one else "wrong" for one in right)]
    assert page.count("<b>✓ ") == sum(right) and page.count("<b>✗ ") == 5 - sum(right)
    assert name not in re.sub(r"<details.*?</details>|title=\"[^\"]*\"", "", page, flags=re.S)


def test_a_file_is_embedded_by_the_model_of_the_set(made: VectorSet, here: Path) -> None:
    blurred = scene(3).copy()
    blurred[:40, :40] += 9
    (here / "photo.png").write_bytes(encoded(blurred))
    rows = search(made, "photo.png", "search.k=24")
    assert len(rows) == 24 and rows[0]["image_id"] == image_id(IMAGES[3])
    assert 0.9 < rows[0]["similarity"] < 1

    (here / "own.png").write_bytes(IMAGES[3])  # its bytes are in the set: no model is needed
    rows = search(made, "own.png", "search.k=24", "search.model=nowhere")
    assert image_id(IMAGES[3]) not in [row["image_id"] for row in rows] and len(rows) == 23
    assert "in the set" in (here / "runs/ask/search/search.html").read_text()


def test_a_folder_a_table_and_vectors_at_once(
    made: VectorSet, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (here / "asked/deep").mkdir(parents=True)
    (here / "asked/a.png").write_bytes(encoded(scene(50)))
    (here / "asked/deep/b.jpg").write_bytes(encoded(scene(51), "JPEG"))
    (here / "asked/broken.png").write_bytes(b"no image")
    (here / "asked/notes.txt").write_text("left alone")
    write_shard(here / "other.parquet", [encoded(scene(60)), encoded(scene(61)), b"broken"])
    facts = made.facts | {"key": "others"}
    images = pq.read_table(made.facts["shards"]["uri"]).slice(0, 2)
    write_table(here / "own/vectors", facts, images, made.read("cls")[:2])
    rows = search(made, "asked,other.parquet,own,own/vectors/part-00000.parquet", "search.k=3")
    names = list(dict.fromkeys(row["query"] for row in rows))
    assert names[:2] == ["asked/a.png", "asked/deep/b.jpg"]
    assert sorted(names[2:4]) == ["photos/cat/0.png", "photos/dog/1.png"]
    assert names[4:] == made.ids()[:2].tolist()
    assert len(rows) == 3 * 8  # those of the last two twice
    bad = pq.read_table("runs/ask/search/bad.parquet").to_pylist()
    assert [(one["source"], one["reason"]) for one in bad] == [
        ("asked/broken.png", "not_an_image"),
        ("photos/cat/2.png", "not_an_image"),
    ]
    assert "files that are no usable images: 2" in caplog.text
    assert "similarity  image_id" not in caplog.text  # too many for a console

    assert {row["query"] for row in search(made, "asked/deep/*.jpg")} == {"b.jpg"}
    with tarfile.open("asked.tar", "w") as archive:
        archive.add("asked/a.png")
    assert {row["query"] for row in search(made, "asked.tar")} == {"asked.tar/asked/a.png"}
    assert not (here / "runs/ask/search/bad.parquet").exists()  # it was of another time


def test_vectors_of_others_in_row_groups_of_any_size(made: VectorSet, here: Path) -> None:
    vectors = made.read("cls")
    table = pa.table({"cls": list(vectors), "image_id": [*made.ids()[:9].tolist(), *[None] * 15]})
    pq.write_table(table, here / "theirs.parquet", row_group_size=7)
    rows = search(made, "theirs.parquet", "search.k=1")
    assert [row["query"] for row in rows[:9]] == made.ids()[:9].tolist()
    assert [row["query"] for row in rows[9:]] == [f"row {n}" for n in range(9, 24)]
    assert all(row["image_id"] != row["query"] for row in rows[:9])  # ids of the set
    assert [row["image_id"] for row in rows[9:]] == made.ids()[9:].tolist()  # no ids: itself


def test_decisions_and_labels_are_shown(
    made: VectorSet, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = str(made.ids()[0])
    search(made, str(made.ids()[5]), "search.k=23")
    copies = [line for line in caplog.text.splitlines() if f"copy of {first[:12]}" in line]
    assert len(copies) == 1 and str(made.ids()[1]) in copies[0]
    assert caplog.text.count(" kept ") == 22
    page = (here / "runs/ask/search/search.html").read_text()
    assert f"copy of {first[:12]}" in page and ">dog<" in page


def test_decisions_are_read_once_for_all_that_is_shown(
    made: VectorSet, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    read = Decisions.read

    def counted(self: Decisions, ids: set[str]) -> dict[str, Decision]:
        asked.append(len(ids))
        return read(self, ids)

    monkeypatch.setattr(Decisions, "read", counted)
    search(made, ",".join(made.ids()[2:5]), "search.k=23")
    assert asked == [24]


def test_equal_vectors_are_said_and_least_similarity_counts(
    made: VectorSet, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = pq.read_table(made.facts["shards"]["uri"])
    vectors = made.read("cls")
    vectors[[3, 9]] = vectors[6]
    copies = write_table(here / "copies", made.facts, images, vectors)
    name = str(made.ids()[6])
    rows = search(copies, name, "search.k=2")
    assert [row["image_id"] for row in rows] == made.ids()[[3, 9]].tolist()
    assert [row["similarity"] for row in rows] == [1, 1]
    assert "2 images have the same vector" in caplog.text
    assert len(search(copies, name, "search.min_similarity=0.9999")) == 2
    assert search(copies, str(made.ids()[0]), "search.min_similarity=0.99999") == []
    assert "No image is as similar as was asked" in caplog.text


def test_without_the_images_the_page_says_so(
    made: VectorSet, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(made.uri, here / "vectors")
    facts = made.facts | {"shards": made.facts["shards"] | {"uri": str(here / "gone")}}
    images = pq.read_table(made.facts["shards"]["uri"])
    moved = write_table(here / "moved", facts, images, made.read("cls"))
    assert len(search(moved, str(made.ids()[0]))) == 20
    page = (here / "runs/ask/search/search.html").read_text()
    assert "Without pictures of the set: no such path" in page and "data:image" not in page
    assert "Without pictures" in caplog.text


def test_a_run_folder_that_was_moved_has_its_pictures_and_its_model(here: Path) -> None:
    torch.manual_seed(0)
    shape = BackboneSpec(image_size=32, patch_size=8, width=16, depth=2, heads=2)
    weights = save_backbone(shape.build(), shape, here / "runs/old/export/weights/s-8")
    write_shard(here / "runs/old/shards/a.parquet", IMAGES)
    shards = here / "runs/old/shards/a.parquet"
    vectors = write_vectors(here / "runs/old/vectors", shards, embedder_of(str(weights)))
    assert vectors.facts["model"].startswith(str(here / "runs/old"))
    (here / "runs/old").rename(here / "new")
    moved = open_vectors(str(here / "new"))
    assert moved.shards().uri == str(here / "new/shards/a.parquet")
    assert moved.images()[image_id(IMAGES[3])] == IMAGES[3]
    (here / "photo.png").write_bytes(encoded(scene(40)))
    assert len(search(moved, "photo.png")) == 20
    write_shard(here / "new/shards/a.parquet", IMAGES[1:])  # of that name, but others
    with pytest.raises(PipelineError, match=r"no such path.*runs/old/shards"):
        moved.shards()
    shutil.rmtree(here / "new/export")
    with pytest.raises(PipelineError, match="model of the set, which cannot be opened"):
        search(moved, "photo.png")


def test_an_id_in_capitals_and_unfinished_vectors(made: VectorSet, here: Path) -> None:
    name = str(made.ids()[7])
    assert {row["query"] for row in search(made, name.upper())} == {name}
    part = pq.read_table(f"{made.uri}/part-00000.parquet")
    (here / "stopped/vectors").mkdir(parents=True)
    metadata = {**part.schema.metadata, b"raydino.part": b"{}"}
    pq.write_table(part.replace_schema_metadata(metadata), "stopped/vectors/part-00000.parquet")
    for folder in ("stopped", "stopped/vectors"):
        with pytest.raises(PipelineError, match="there are no finished vectors"):
            search(made, folder)


def test_refused(made: VectorSet, here: Path) -> None:
    (here / "broken.png").write_bytes(b"no image")
    (here / "empty").mkdir()
    (here / "texts").mkdir()
    (here / "texts/notes.txt").write_text("no image, and does not claim to be one")
    (here / "bad").mkdir()
    (here / "bad/x.png").write_bytes(b"no image")
    (here / "photo.png").write_bytes(encoded(scene(40)))
    images = pq.read_table(made.facts["shards"]["uri"])
    other = made.facts | {"digest": "abc", "model": "runs/other"}
    write_table(here / "others", other, images, made.read("cls"))
    ranged = made.facts | {"value_range": [0, 1023]}
    write_table(here / "ranged", ranged, images, made.read("cls"))
    write_table(here / "none", made.facts, images.slice(0, 0), np.zeros((0, made.dim), "f4"))
    infinite = made.read("cls")
    infinite[4, 0] = np.nan
    write_table(here / "nan", made.facts, images, infinite)
    narrow = made.facts | {"dim": 7}
    write_table(here / "narrow", narrow, images, np.ones((24, 7), "f4"))
    for vectors, query, words in (
        (made.uri, "", "nothing is asked: search.query is empty"),
        (made.uri, "nowhere.jpg", "there is no such file, and no image of the set has an id"),
        (made.uri, "abc", "there is no such file, and no image"),
        (made.uri, "broken.png", "search.query=broken.png is no usable image: not_an_image"),
        (made.uri, "empty", "no files under"),
        (made.uri, "texts", "nothing is asked: search.query holds no image and no vector"),
        (made.uri, "bad", "none of 1 files is a usable image; the first: bad/x.png"),
        (made.uri, "others", "these vectors are of another model (runs/other, abc)"),
        (made.uri, "others/part-00000.parquet", "these vectors are of another model (runs/other"),
        (made.uri, "ranged", "these vectors are of another value range (descriptor, [0, 1023])"),
        (made.uri, "narrow/part-00000.parquet", "expected 143 in each"),
        ("others", "photo.png", "the model of the set, which cannot be opened"),
        ("nowhere", "photo.png", "search.vectors=nowhere: there are no finished vectors"),
        ("none", "photo.png", "holds no vectors: there is nothing to search in"),
        ("nan", "photo.png", "1 rows of 24; the first is row 4"),
    ):
        with pytest.raises(PipelineError) as error:
            look_up(load([f"search.vectors={vectors}", f"search.query={query}", "run.name=ask"]))
        assert words in error.value.what, (query, error.value.what)
        assert "\n" not in error.value.what
    with pytest.raises(
        PipelineError, match=r"digest of the weights is 1, that of the vectors is a"
    ):
        search(_renamed(here / "others", here / "x", "descriptor"), "photo.png")
    with pytest.raises(PipelineError, match="there are no decisions of a curation"):
        search(made, "photo.png", "search.decisions=empty")
    with pytest.raises(PipelineError, match="holds cls, no mean"):
        search(made, "photo.png", "search.vectors_column=mean")


def _renamed(folder: Path, target: Path, model: str) -> VectorSet:
    text = (folder / "_vectors.json").read_text().replace("runs/other", model)
    shutil.copytree(folder, target)
    (target / "_vectors.json").write_text(text)
    return open_vectors(str(target))


def test_an_ambiguous_beginning_is_said(made: VectorSet, here: Path) -> None:
    images = pq.read_table(made.facts["shards"]["uri"]).slice(0, 3)
    ids = ["abcd" + name[4:] for name in images["image_id"].to_pylist()]
    images = images.set_column(0, "image_id", [ids])
    alike = write_table(here / "alike", made.facts, images, made.read("cls")[:3])
    with pytest.raises(PipelineError, match="3 images have ids that begin so: abcd"):
        search(alike, "abcd")
    assert len(search(alike, ids[1])) == 2


def test_byte_identical_images_are_asked_for_by_their_id(made: VectorSet, here: Path) -> None:
    images = pq.read_table(made.facts["shards"]["uri"]).slice(0, 3)
    ids = images["image_id"].to_pylist()
    images = images.set_column(0, "image_id", [[ids[0], ids[1], ids[1]]])
    images = images.set_column(images.schema.get_field_index("source"), "source", [list("abc")])
    twins = write_table(here / "twins", made.facts, images, made.read("cls")[[0, 1, 1]])
    for query in (ids[1], ids[1][:8]):
        rows = search(twins, query)
        assert [(row["query"], row["source"]) for row in rows] == [(ids[1], "c"), (ids[1], "a")]
        assert rows[0]["similarity"] == 1


def test_two_jobs_do_not_write_into_one_folder(made: VectorSet, here: Path) -> None:
    with (
        RunFolder.of("runs", "ask").locked(),
        pytest.raises(PipelineError, match="another job is working in"),
    ):
        search(made, str(made.ids()[0]))
    assert not (here / "runs/ask/search").exists()


def test_the_command(made: VectorSet, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = {name: f"search.{name}" for name in ("vectors", "query", "k")}
    name = str(made.ids()[2])
    main(["search"], "", [f"vectors={made.uri}", f"query={name}", "k=4"], short)
    out = capsys.readouterr().out
    assert f"query       {name}" in out and "page        " in out
    assert out.count("photos/") == 4
    assert (here / "runs/search/search/search.html").is_file()


def test_an_index_is_built_beside_the_vectors(
    made: VectorSet, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("faiss")
    draw = np.random.default_rng(0)
    near = draw.normal(size=(30, made.dim))[draw.integers(0, 30, 10_000)]
    vectors = (near + 0.3 * draw.normal(size=near.shape)).astype(np.float32)
    images = pa.table(
        {
            "image_id": [f"{n:032x}" for n in range(10_000)],
            "source": [f"{n}.png" for n in range(10_000)],
            "label": pa.nulls(10_000, pa.int64()),
        }
    )
    facts = made.facts | {"shards": made.facts["shards"] | {"uri": "gone"}}
    large = write_table(here / "large", facts, images, vectors, 3)
    exact = search(large, f"{5:032x}", "search.k=10")
    rows = search(large, f"{5:032x}", "search.k=10", "search.index=ivf")
    assert json.loads((here / "large/_index.json").read_text())["recall"] >= 0.95
    assert "index       built in" in caplog.text
    assert len({row["image_id"] for row in rows} & {row["image_id"] for row in exact}) >= 8
    assert "index of 256 lists" in (here / "runs/ask/search/search.html").read_text()
    caplog.clear()
    assert search(large, f"{5:032x}", "search.k=10", "search.index=ivf") == rows
    assert "built in" not in caplog.text and "recall@10" in caplog.text
