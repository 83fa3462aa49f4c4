"""Shards opened and read back, against tables written with plain pyarrow and digests of hashlib."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs

from pipeline.errors import DataError
from pipeline.shards.columns import BAD_IMAGE_SCHEMA, IMAGE_SHARD_SCHEMA, image_id
from pipeline.shards.row_group import read_row_group
from pipeline.shards.shard_set import open_parquet
from pipeline.shards.shards import open_shards
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import atomic_path, write_bytes_atomic, write_parquet_atomic
from tests import data

NAMES = ["cat", "dog"]
HUB = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": NAMES}}}}


def hub_table(rows=7, *, labels=True):
    """As the Hugging Face hub stores images."""
    images = [b"image %d" % i for i in range(rows)]
    return data.hub_table(images, [i % 2 for i in range(rows)] if labels else None, NAMES)


def own_table(rows=5, names=("a",)):
    return data.own_table(
        sorted((b"picture %d" % i for i in range(rows)), key=image_id), names=names
    )


@given(st.binary(max_size=100))
def test_image_id_is_blake2b(encoded):
    assert image_id(encoded) == hashlib.blake2b(encoded, digest_size=16).digest().hex()


def test_schemas_are_the_contract():
    assert IMAGE_SHARD_SCHEMA.names == [
        "image_id", "image", "width", "height", "format", "source", "label",
    ]  # fmt: skip
    assert BAD_IMAGE_SCHEMA.names == ["source", "image_id", "stage", "reason", "detail"]


def test_hub_shards_are_read_as_they_are(tmp_path):
    pq.write_table(hub_table(7), tmp_path / "train-00000.parquet", row_group_size=3)
    pq.write_table(hub_table(2), tmp_path / "train-00001.parquet")
    shards = open_shards(str(tmp_path))
    assert [file.row_groups for file in shards.files] == [(3, 3, 1), (2,)]
    assert (shards.rows, shards.class_names, shards.packed) == (9, ("cat", "dog"), False)
    assert shards.has_labels
    rows = read_row_group(shards, 0, 1)
    assert [rows.image(i) for i in range(len(rows))] == [b"image 3", b"image 4", b"image 5"]
    assert rows.hex_ids == [hashlib.blake2b(b"image %d" % i, digest_size=16).hexdigest()
                            for i in (3, 4, 5)]  # fmt: skip
    assert rows.image_ids.shape == (3, 16)
    assert rows.image_ids.flags.writeable
    np.testing.assert_array_equal(rows.labels, [1, 0, 1])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_plain_binary_columns_and_null_images(tmp_path, kind):
    pq.write_table(pa.table({"img": pa.array([b"x", None, b"z"], kind)}), tmp_path / "a.parquet")
    shards = open_shards(str(tmp_path / "a.parquet"), image_column="img")
    rows = read_row_group(shards, 0, 0)
    assert [rows.image(i) for i in range(3)] == [b"x", b"", b"z"]
    assert not shards.has_labels
    np.testing.assert_array_equal(rows.labels, [-1, -1, -1])


def test_null_structs_in_a_slice(tmp_path):
    kind = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
    values = [{"bytes": b"a", "path": None}, None, {"bytes": None, "path": "x"}, {"bytes": b"d"}]
    pq.write_table(pa.table({"image": pa.array(values, kind)}), tmp_path / "a.parquet")
    rows = read_row_group(open_shards(str(tmp_path)), 0, 0)
    assert [rows.image(i) for i in range(4)] == [b"a", b"", b"", b"d"]


def test_own_shards_keep_their_ids_and_null_labels(tmp_path):
    fs, path = resolve_uri(str(tmp_path / "a.parquet"))
    write_parquet_atomic(own_table(), fs, path, 3)
    shards = open_shards(str(tmp_path / "*.parquet"))
    assert (shards.packed, shards.has_labels, shards.class_names) == (True, False, ("a",))
    assert shards.files[0].row_groups == (3, 2)
    rows = read_row_group(shards, 0, 1)
    assert rows.hex_ids == own_table()["image_id"].to_pylist()[3:]
    assert (rows.labels == -1).all()


def test_foreign_id_columns_are_not_believed(tmp_path):
    table = hub_table(2).append_column("image_id", pa.array([17, 18]))
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_row_group(open_shards(str(tmp_path)), 0, 0).hex_ids[0] == image_id(b"image 0")


def test_patterns_uris_and_hidden_files(tmp_path):
    folder = tmp_path / "a folder"
    for name in ("train-0", "train-1", "test-0", ".hidden", "_part"):
        (folder / "deep").mkdir(parents=True, exist_ok=True)
        pq.write_table(hub_table(2), folder / f"{name}.parquet")
    pq.write_table(hub_table(2), folder / "deep" / "more.parquet")
    (folder / "readme.txt").write_text("not a shard")
    assert open_shards(str(folder)).rows == 8
    assert open_shards(f"{folder}/train-*.parquet").rows == 4
    assert open_shards(folder.as_uri()).rows == 8
    assert open_shards(folder.as_uri() + "/train-*.parquet").rows == 4
    assert open_shards(str(folder / "test-0.parquet")).rows == 2


def test_digest_names_the_content_and_not_the_place(tmp_path):
    for folder, rows in (("one", 3), ("two", 3), ("three", 4)):
        (tmp_path / folder).mkdir()
        pq.write_table(hub_table(rows), tmp_path / folder / "a.parquet")
    one, two, three = (open_shards(str(tmp_path / f)).digest for f in ("one", "two", "three"))
    assert one == two != three


def test_a_shard_set_is_small_to_send(tmp_path):
    pq.write_table(hub_table(200), tmp_path / "a.parquet", row_group_size=2)
    shards = open_shards(str(tmp_path))
    sent = pickle.dumps(shards)
    assert len(sent) < 1500
    assert pickle.loads(sent) == shards


def mistake(uri, **columns):
    with pytest.raises(DataError) as caught:
        open_shards(str(uri), **columns)
    assert caught.value.hint
    return str(caught.value)


def test_mistakes_have_sentences(tmp_path):
    assert "no such path" in mistake(tmp_path / "nowhere")
    assert "no such path" in mistake(tmp_path / "nowhere" / "*.parquet")
    assert "no parquet files" in mistake(tmp_path)
    assert "cannot open" in mistake("nonsense://bucket/x")
    table = hub_table().rename_columns(["img", "label"])
    pq.write_table(table, tmp_path / "part-0003.parquet")
    assert mistake(tmp_path) == (
        'shard part-0003.parquet has no column "image" (found: img, label).\n'
        "  Name it with data.image_column=img."
    )
    assert 'has no column "classes"' in mistake(
        tmp_path, image_column="img", label_column="classes"
    )
    assert "holds int64, expected the encoded image" in mistake(tmp_path, image_column="label")
    assert "expected class names" in mistake(tmp_path, image_column="img", label_column="img")
    (tmp_path / "part-0003.parquet").write_bytes(b"PAR1 cut")
    assert "not a readable parquet file" in mistake(tmp_path)


def test_different_class_names_are_refused(tmp_path):
    pq.write_table(hub_table(), tmp_path / "a.parquet")
    other = {"info": {"features": {"label": {"names": ["dog", "cat"]}}}}
    table = hub_table().replace_schema_metadata({"huggingface": json.dumps(other)})
    pq.write_table(table, tmp_path / "b.parquet")
    assert "different class names" in mistake(tmp_path)


def test_unfinished_and_future_shards_are_refused(tmp_path):
    fs, path = resolve_uri(str(tmp_path / "part-00000.parquet"))
    write_parquet_atomic(own_table(), fs, path, 5)
    assert "packing was not finished" in mistake(tmp_path)
    future = {b"raydino": b'{"schema_version": 99}'}
    write_parquet_atomic(own_table().replace_schema_metadata(future), fs, path, 5)
    assert "schema version 99" in mistake(tmp_path)


def test_a_write_is_whole_or_not_there(tmp_path):
    fs, path = pafs.LocalFileSystem(), str(tmp_path / "deep" / "a.parquet")
    write_parquet_atomic(own_table(5), fs, path, 2)
    before = (tmp_path / "deep" / "a.parquet").read_bytes()
    with pytest.raises(RuntimeError), atomic_path(fs, path) as temporary:
        Path(temporary).write_bytes(b"half")
        raise RuntimeError("the disk is full")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.parquet"]
    assert (tmp_path / "deep" / "a.parquet").read_bytes() == before
    write_bytes_atomic(b"{}", fs, str(tmp_path / "deep" / "b.json"))
    assert (tmp_path / "deep" / "b.json").read_bytes() == b"{}"


def test_writes_work_on_other_file_systems(tmp_path):
    for fs in (
        pafs._MockFileSystem(),
        pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()),
    ):
        write_parquet_atomic(own_table(5), fs, "deep/a.parquet", 2)
        with fs.open_input_file("deep/a.parquet") as stream:
            parquet = pq.ParquetFile(stream)
            assert parquet.read().equals(own_table(5))
            assert parquet.metadata.num_row_groups == 3
        assert len(fs.get_file_info(pafs.FileSelector("deep"))) == 1


def test_footers_hold_no_image_bytes(tmp_path):
    fs, path = resolve_uri(str(tmp_path / "a.parquet"))
    write_parquet_atomic(own_table(5), fs, path, 5)
    meta = pq.ParquetFile(path).metadata
    stats = {meta.row_group(0).column(i).path_in_schema: meta.row_group(0).column(i)
             for i in range(meta.num_columns)}  # fmt: skip
    assert stats["image"].statistics is None
    assert stats["image"].compression == "UNCOMPRESSED"
    assert stats["image_id"].statistics.min == own_table(5)["image_id"][0].as_py()


def test_imports_neither_torch_nor_ray():
    import subprocess
    import sys

    code = (
        "import sys, pipeline.shards.row_group, pipeline.images.decode;"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cifar10(shared):
    shards = open_shards(f"{shared}/data/cifar10/train-*.parquet")
    assert shards.rows == 50_000
    assert shards.class_names[:2] == ("airplane", "automobile")
    assert shards.has_labels
    assert not shards.packed


def test_a_damaged_row_group_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    images = [bytes([i]) * 5000 for i in range(20)]
    table = pa.table({"image": pa.array(images, pa.binary())})
    write_parquet_atomic(table, *resolve_uri(str(path)), row_group_size=20)
    shards = open_shards(str(tmp_path))
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196  # the first page's header; the footer stays whole
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"row group 0 of .*a\.parquet cannot be read: \S"):
        read_row_group(shards, 0, 0)


def parquet(path: Path, label: pa.Array, names=()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": pa.array([b"x"] * len(label), pa.binary()), "label": label})
    if names:
        about = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, path)


def test_a_label_column_of_names_is_read_as_it_is(tmp_path):
    parquet(tmp_path / "a.parquet", pa.array(["dog", "cat", None, ""]))
    parquet(tmp_path / "b.parquet", pa.array(["emu", "cat"]).dictionary_encode())
    shards = open_shards(str(tmp_path))
    assert (shards.class_names, shards.has_labels) == (("cat", "dog", "emu"), True)
    labels = [read_row_group(shards, i, 0).labels.tolist() for i in range(2)]
    assert labels == [[1, 0, -1, -1], [2, 0]]
    unread = open_shards(str(tmp_path), labels=False)
    assert (unread.class_names, unread.has_labels) == ((), False)
    assert read_row_group(unread, 0, 0).labels.tolist() == [-1] * 4
    parquet(tmp_path / "c.parquet", pa.array([0.5]))
    assert "holds double, expected class names" in mistake(tmp_path)
    assert open_shards(str(tmp_path), labels=False).rows == 7


def test_a_test_set_whose_labels_are_withheld_has_none(tmp_path):
    parquet(tmp_path / "a.parquet", pa.array([-1, -1]), NAMES)
    assert not open_shards(str(tmp_path)).has_labels
    parquet(tmp_path / "b.parquet", pa.array([0, -1]), NAMES)
    assert open_shards(str(tmp_path)).has_labels


def test_files_that_count_in_different_lists_are_refused(tmp_path):
    parquet(tmp_path / "a.parquet", pa.array([0, 1]), NAMES)
    for label, names in ((pa.array([0]), NAMES[::-1]), (pa.array([0]), ()), (pa.array(["x"]), ())):
        parquet(tmp_path / "b.parquet", label, names)
        assert "have different class names, or some have names" in mistake(tmp_path)
    parquet(tmp_path / "b.parquet", pa.array([None, -1], pa.int64()), NAMES[::-1])
    assert open_shards(str(tmp_path)).class_names == tuple(NAMES)


def test_a_file_of_any_name_is_opened_and_one_that_is_none_is_a_sentence(tmp_path):
    """Of others: a name that is no UTF-8, which Arrow by itself does not open; a file cut short."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.parquet")
    data.written([b"a"], tmp_path / "a.parquet", 1)
    (tmp_path / "a.parquet").rename(path)
    with open_parquet(pafs.LocalFileSystem(), path, piecewise=True) as parquet:
        assert parquet.metadata.num_rows == 1
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(Path(path).read_bytes()[:-9])
    for piecewise in (False, True):
        with pytest.raises(
            DataError, match=r"cut\.parquet is not a readable parquet file"
        ) as caught:
            open_parquet(pafs.LocalFileSystem(), str(cut), piecewise)
        assert "fetch it again or take it away" in caught.value.hint
