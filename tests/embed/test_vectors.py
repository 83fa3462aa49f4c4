"""The table of vectors: every image once, the same bytes again, and readers of other programs."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.embed import pool, run
from pipeline.embed.embedders import EmbedderSpec, embedder_of, open_embedder
from pipeline.embed.forward import UNMODELLED
from pipeline.embed.image_reader import ImageReader
from pipeline.embed.run import Request, embed_set
from pipeline.embed.units import units_of
from pipeline.embed.vectors import VectorSet, open_vectors
from pipeline.errors import DataError
from pipeline.evaluate.baselines import colour_vectors, pixel_vectors
from pipeline.images.decode import decode_image
from pipeline.shards.columns import image_id
from pipeline.shards.shards import open_shards
from pipeline.views.crops import resize_centre_crop
from tests.curate.images import scene, shard
from tests.data import encoded
from tests.embed.conftest import IMAGES, SPEC
from tests.s3 import S3

pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture
def vectors(request_: Request, tmp_path: Path, small_units: Callable[[int], None]) -> VectorSet:
    small_units(5)
    request = Request(**{**request_.__dict__, "blocks": 2})
    return embed_set(request, str(tmp_path / "vectors"), tmp_path / "bad.parquet").vectors


def content(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_every_image_is_in_it_once_or_in_the_bad_table(
    vectors: VectorSet, spec: EmbedderSpec, tmp_path: Path
) -> None:
    assert vectors.ids().tolist() == [image_id(image) for image in IMAGES]
    assert vectors.places().tolist() == [*range(6), *range(8, 13)]
    assert vectors.sources().tolist() == [
        *(f"a/{i}.img" for i in range(6)),
        *(f"b/{i}.img" for i in range(5)),
    ]
    assert vectors.labels().tolist() == [-1] * 11
    bad = pq.read_table(tmp_path / "bad.parquet").to_pylist()
    assert [(row["source"], row["reason"], row["stage"]) for row in bad] == [
        ("a/6.img", "not_an_image", "embed"),
        ("a/7.img", "empty", "embed"),
    ]
    embedder = open_embedder(spec)
    images = [embedder.prepare(decode_image(image)) for image in IMAGES]
    ours = embedder.outputs(images, vectors.outputs, 2)
    assert [len(part) for part, _ in vectors.blocks(4)] == [3, 3, 4, 1]  # units, in pieces
    for name in vectors.outputs:
        assert vectors.read(name).shape == ours[name].shape
        allowed = 4e-3 if name == "patches" else 1e-5  # float16 of values up to 4, float32
        np.testing.assert_allclose(vectors.read(name), ours[name], atol=allowed)
    np.testing.assert_array_equal(vectors.read("cls", slice(4, 9)), vectors.read("cls")[4:9])
    assert vectors.facts["digest"] == spec.digest and vectors.facts["image_size"] == 28
    for path in Path(vectors.uri).glob("part-*.parquet"):
        facts = json.loads(pq.read_schema(path).metadata[b"raydino"])
        assert facts["key"] == vectors.key and facts["mean"] == list(spec.mean)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pixels_and_colours_stand_beside_what_a_model_gives(
    request_: Request, tmp_path: Path, dtype: str
) -> None:
    outputs = ("cls", *UNMODELLED)
    request = replace(request_, outputs=outputs, dtype=dtype)
    vectors = embed_set(request, str(tmp_path / "vectors")).vectors
    images = np.stack([resize_centre_crop(decode_image(image), 28) for image in IMAGES])
    allowed = 1e-3 if dtype == "float16" else 0
    for name, ours in zip(UNMODELLED, (pixel_vectors, colour_vectors), strict=True):
        assert vectors.read(name).dtype == np.float32
        np.testing.assert_allclose(vectors.read(name), ours(images), atol=allowed)


def test_images_come_by_their_ids(vectors: VectorSet, pile: Path) -> None:
    images = vectors.images()
    for image in reversed(IMAGES):
        assert images[image_id(image)] == image
    assert image_id(b"other") not in images
    with pytest.raises(KeyError):
        images[image_id(b"other")]
    shard(pile / "b.parquet", IMAGES[7:])
    with pytest.raises(DataError, match="have changed since they were embedded"):
        vectors.images()


def test_threads_that_want_a_row_group_read_it_once(
    vectors: VectorSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    read = ImageReader._read

    def slowly(reader: ImageReader, group: int) -> list[memoryview]:
        groups.append(group)
        time.sleep(0.05)
        return read(reader, group)

    monkeypatch.setattr(ImageReader, "_read", slowly)
    images = vectors.images()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda image: images[image_id(image)], IMAGES)) == IMAGES
    assert len(groups) == len(set(groups))


def test_the_same_command_goes_on_and_ends_in_the_same_bytes(
    request_: Request, tmp_path: Path, inline: list[int], small_units: Callable[[int], None]
) -> None:
    small_units(3)
    request = Request(**{**request_.__dict__, "outputs": ("cls",)})
    folder = tmp_path / "vectors"
    embed_set(request, str(folder), tmp_path / "bad.parquet")
    whole, bad = content(folder), (tmp_path / "bad.parquet").read_bytes()
    assert inline == [0, 1, 2, 3, 4]
    embed_set(request, str(folder), tmp_path / "bad.parquet")
    assert inline == [0, 1, 2, 3, 4]  # nothing left to do
    (folder / "part-00001.parquet").unlink()
    (folder / "part-00003.parquet").write_bytes(whole["part-00003.parquet"][:-9])  # cut
    (folder / "_vectors.json").unlink()
    (folder / ".part-00002.parquet.abc.tmp").write_bytes(b"left by a kill")
    with pytest.raises(DataError, match="no finished vectors"):
        open_vectors(str(folder))
    embed_set(request, str(folder), tmp_path / "bad.parquet")
    assert inline[5:] == [1, 3]
    assert content(folder) == whole and (tmp_path / "bad.parquet").read_bytes() == bad


def test_another_model_starts_anew_and_says_so(
    request_: Request, tmp_path: Path, inline: list[int], caplog: Any
) -> None:
    import torch

    from pipeline.model.weights import save_backbone

    folder = str(tmp_path / "vectors")
    first = embed_set(Request(**{**request_.__dict__, "outputs": ("cls",)}), folder).vectors
    torch.manual_seed(1)
    other = embedder_of(str(save_backbone(SPEC.build(), SPEC, tmp_path / "other")))
    with caplog.at_level(logging.WARNING):
        changed = Request(**{**request_.__dict__, "outputs": ("cls",), "spec": other})
        second = embed_set(changed, folder).vectors
    assert "the model" in caplog.text and "all are made anew" in caplog.text
    assert inline == [0, 1, 0, 1] and first.key != second.key
    assert second.facts["digest"] == other.digest
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        embed_set(Request(**{**changed.__dict__, "dtype": "float16"}), folder)
    assert "other settings (dtype)" in caplog.text


def test_an_open_table_never_reads_the_parts_of_another_model(
    request_: Request, tmp_path: Path, small_units: Callable[[int], None], monkeypatch: Any
) -> None:
    small_units(5)
    folder = tmp_path / "vectors"
    asked = Request(**{**request_.__dict__, "outputs": ("cls",)})
    table = embed_set(asked, str(folder)).vectors
    other = Request(**{**asked.__dict__, "spec": replace(asked.spec, digest="another")})

    def killed(reads: Any, assignment: pool.Assignment) -> Any:
        yield pool._embed_all(reads[:1], replace(assignment, gpu=False)), 1
        raise KeyboardInterrupt

    for name in ("embedded_in_one_task", "embedded_by_pool"):
        monkeypatch.setattr(run, name, killed)
    with pytest.raises(KeyboardInterrupt):
        embed_set(other, str(folder))
    assert list(content(folder)) == ["part-00000.parquet"]  # no part of the earlier table
    with pytest.raises(DataError, match=r"part-00000\.parquet is of other vectors"):
        table.read()


def test_too_many_bad_images_end_it_without_a_table(
    request_: Request, tmp_path: Path, inline: list[int]
) -> None:
    folder, bad = tmp_path / "vectors", tmp_path / "bad.parquet"
    strict = Request(**{**request_.__dict__, "max_bad_fraction": 0.1})
    with pytest.raises(
        DataError, match=r"2 of 13 images .*15\.4 %, allowed 10 %.*1 empty"
    ) as error:
        embed_set(strict, str(folder), bad)
    assert str(bad) in error.value.hint and pq.read_table(bad).num_rows == 2
    with pytest.raises(DataError, match="no finished vectors"):
        open_vectors(str(folder))
    embedded = list(inline)
    enough = Request(**{**request_.__dict__, "max_bad_fraction": 2 / 13})
    assert embed_set(enough, str(folder), bad).vectors.rows == 11 and inline == embedded


def test_a_shorter_set_leaves_no_part_behind(
    spec: EmbedderSpec, tmp_path: Path, small_units: Callable[[int], None]
) -> None:
    small_units(3)
    folder = str(tmp_path / "vectors")
    shard(tmp_path / "in" / "a.parquet", IMAGES[:9], group=3)
    embed_set(Request(spec, open_shards(str(tmp_path / "in"))), folder)
    shard(tmp_path / "in" / "a.parquet", IMAGES[:4], group=3)
    vectors = embed_set(Request(spec, open_shards(str(tmp_path / "in"))), folder).vectors
    assert sorted(content(folder)) == ["_vectors.json", "part-00000.parquet", "part-00001.parquet"]
    assert vectors.rows == len(pq.read_table(folder)) == 4


def test_what_is_not_ours_stays(request_: Request, tmp_path: Path) -> None:
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "mine.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no vectors of ours, such as mine\.parquet"):
        embed_set(request_, str(tmp_path / "vectors"))
    assert sorted(content(tmp_path / "vectors")) == ["mine.parquet"]


def test_numbers_that_were_overwritten_are_refused(vectors: VectorSet) -> None:
    path = Path(vectors.uri) / "part-00001.parquet"
    values = vectors.read()[5].tobytes()  # some row of it, stored plain
    content = bytearray(path.read_bytes())
    at = next(i for v in vectors.read() if (i := content.find(v.tobytes())) >= 0)
    content[at : at + len(values)] = bytes(len(values))
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00001\.parquet is damaged"):
        vectors.read()


@pytest.mark.parametrize("content", ["[]", '{"version": 0}', '{"version": 1}'])
def test_a_mark_of_others(content: str, tmp_path: Path) -> None:
    (tmp_path / "_vectors.json").write_text(content)
    with pytest.raises(DataError, match=r"_vectors\.json is none of this version"):
        open_vectors(str(tmp_path))


def test_where_nothing_can_be_decoded(spec: EmbedderSpec, tmp_path: Path) -> None:
    shard(tmp_path / "in" / "a.parquet", [b"broken", b"too"])
    with pytest.raises(DataError, match=r"no image of .* could be embedded: not_an_image"):
        embed_set(Request(spec, open_shards(str(tmp_path / "in"))), str(tmp_path / "vectors"))


@pytest.mark.parametrize("most", [1, 4, 7, 1000])
def test_units_cover_every_row_once(tmp_path: Path, most: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("pipeline.embed.units.UNIT_IMAGES", most)
    tiny = [encoded(scene(n, 8, 8)) for n in range(3)]
    shard(tmp_path / "a.parquet", tiny * 7, groups=(9, 2, 2, 1, 7))
    shard(tmp_path / "b.parquet", tiny, groups=(3,))
    shards = open_shards(str(tmp_path))
    units = units_of(shards, image_bytes=100)
    assert [u.number for u in units] == list(range(len(units)))
    assert [u.first for u in units] == np.cumsum([0, *(u.rows for u in units)])[:-1].tolist()
    assert sum(u.rows for u in units) == 24 and max(u.rows for u in units) <= most
    rows = {
        (u.path, sum(shards.files[u.path.endswith("b.parquet")].row_groups[: u.groups[0]]) + i)
        for u in units
        for i in range(u.start, u.start + u.rows)
    }
    assert len(rows) == 24
    assert units_of(shards, image_bytes=2**27)[0].rows == 1  # no larger than memory allows


# ---- Other programs.


def test_pandas(vectors: VectorSet) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(vectors.uri)
    assert list(frame.columns[:4]) == ["image_id", "source", "label", "row"]
    np.testing.assert_array_equal(np.stack(frame["cls"]), vectors.read())
    assert np.stack(frame["patches"]).dtype == np.float16


def test_torch(vectors: VectorSet) -> None:
    import torch

    column = pq.read_table(vectors.uri, columns=["cls"])["cls"].combine_chunks()
    x = torch.from_numpy(column.flatten().to_numpy().copy()).view(len(column), -1)
    assert torch.equal(x, torch.from_numpy(vectors.read()))


def test_faiss(vectors: VectorSet) -> None:
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(vectors.dim)
    for block, _ in vectors.blocks():
        index.add(block)
    _, rows = index.search(vectors.read(), 1)
    products = vectors.read() @ vectors.read().T
    assert rows[:, 0].tolist() == products.argmax(1).tolist()


def test_duckdb(vectors: VectorSet) -> None:
    duckdb = pytest.importorskip("duckdb")
    query = (
        f"select image_id, array_cosine_similarity(cls::float[{vectors.dim}], "
        f"(select cls::float[{vectors.dim}] from read_parquet('{vectors.uri}/*.parquet') "
        f"where row = 0)) as s from read_parquet('{vectors.uri}/*.parquet') order by s desc limit 3"
    )
    answer = duckdb.sql(query).fetchall()
    unit = vectors.read() / np.linalg.norm(vectors.read(), axis=1, keepdims=True)
    best = np.argsort(-(unit @ unit[0]))[:3]
    assert [row[0] for row in answer] == vectors.ids()[best].tolist()


def test_lance(vectors: VectorSet, tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    os.environ.setdefault("LANCE_CPU_THREADS", "1")
    table = pq.read_table(vectors.uri, columns=["image_id", "cls"])
    data = lance.write_dataset(table, str(tmp_path / "lance"))
    first = vectors.read()[0]
    nearest = {"column": "cls", "q": first, "k": 3, "metric": "cosine"}
    found = data.to_table(nearest=nearest).column("image_id").to_pylist()
    unit = vectors.read() / np.linalg.norm(vectors.read(), axis=1, keepdims=True)
    assert found == vectors.ids()[np.argsort(-(unit @ unit[0]))[:3]].tolist()


def test_on_an_object_store(s3: S3, request_: Request, tmp_path: Path, pile: Path) -> None:
    s3.make("vectors")
    for path in pile.iterdir():
        s3.client().upload_file(str(path), "vectors", f"in/{path.name}")
    there = Request(**{**request_.__dict__, "shards": open_shards(s3.uri("vectors/in"))})
    with s3.broken("PUT .*part-00000", 503, times=1):
        embed_set(there, s3.uri("vectors/out"), s3.uri("vectors/bad.parquet"))
    vectors = open_vectors(s3.uri("vectors/out"))
    local = embed_set(request_, str(tmp_path / "local")).vectors
    np.testing.assert_array_equal(vectors.read(), local.read())
    assert vectors.images()[image_id(IMAGES[3])] == IMAGES[3]
    assert sorted(s3.objects("vectors", "out")) == [
        "out/_vectors.json",
        "out/part-00000.parquet",
        "out/part-00001.parquet",
    ]
