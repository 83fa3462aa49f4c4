"""The index against exact search; what it says of itself; stale, cut and foreign files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ConfigError, DataError
from pipeline.search import ivf, open_search, search
from pipeline.search.ivf import even_rows, lists_for, picked, without

pytest.importorskip("faiss")


class Table:
    """Vectors in a folder, as far as search asks for them."""

    def __init__(self, vectors: np.ndarray, place: Path, key: str = "d1") -> None:
        self.vectors, self.uri, self.key = vectors, str(place), key
        self.rows, self.dim = vectors.shape

    def blocks(self, rows: int, output: str) -> Iterator[tuple[np.ndarray[Any, Any], Any]]:
        del output
        for begin in range(0, self.rows, 3000):  # as files have other sizes than blocks
            yield self.vectors[begin : begin + 3000], None


def clustered(rows: int, dim: int = 16, clusters: int = 40) -> np.ndarray:
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(clusters, dim))
    return (centres[draw.integers(0, clusters, rows)] + 0.4 * draw.normal(size=(rows, dim))).astype(
        np.float32
    )


def test_the_index_finds_what_exact_search_finds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    vectors = clustered(20_000)
    vectors[5000:5030] = vectors[0]  # copies, more than are asked for
    table = Table(vectors, tmp_path)
    fast, exact = open_search(table, index="ivf"), open_search(table, index="exact")
    queries = clustered(300)[200:]
    similarity, rows = fast.find(queries, 10)
    true_similarity, true_rows = exact.find(queries, 10)
    by_loop = [len(set(a) & set(b)) for a, b in zip(rows.tolist(), true_rows.tolist(), strict=True)]
    assert sum(by_loop) >= 0.9 * rows.size
    same = rows == true_rows
    np.testing.assert_allclose(similarity[same], true_similarity[same], atol=2e-7)
    assert (np.diff(similarity, axis=1) <= 0).all()

    told = json.loads((tmp_path / "_index.json").read_text())
    assert told["lists"] == 512 and told["rows"] == 20_000 and told["reached"]
    assert told["recall"] >= 0.95 and told["queries"] == 1000
    assert f"recall@10 {told['recall']:.3f} on 1,000 queries" in caplog.text
    # measured again, from all products at once, own rows left out
    own = even_rows(20_000, 1000)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    hits = 0
    for row, cosine, one in zip(
        own, unit[own] @ unit.T, fast.find(vectors[own], 11)[1], strict=True
    ):
        tenth = np.sort(np.delete(cosine, row))[-10]
        hits += sum(cosine[other] >= tenth - 1e-6 for other in one[one != row][:10])
    assert hits / 10_000 == pytest.approx(told["recall"], abs=2e-3)


def test_a_query_whose_lists_hold_too_few_looks_at_more(tmp_path: Path) -> None:
    table = Table(clustered(12_000), tmp_path)
    found = open_search(table, index="ivf").find(table.vectors[:2], 11_999)
    assert (found[1] >= 0).all() and len(set(found[1][0])) == 11_999
    assert open_search(table, index="ivf").find(table.vectors[:1], 50_000)[1].shape == (1, 12_000)


def test_a_stored_index_is_used_and_a_stale_one_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ivf, "RECALL_QUERIES", 50)
    vectors = clustered(10_000)
    vectors[[4, 8000]] = 0
    first = open_search(Table(vectors, tmp_path), index="ivf")
    (file,) = tmp_path.glob("*.faiss")
    with monkeypatch.context() as patch:
        patch.setattr(search, "built", None)  # building would fail
        again = open_search(Table(vectors, tmp_path), index="ivf")
    for one, other in zip(again.find(vectors[:9], 5), first.find(vectors[:9], 5), strict=True):
        assert (one == other).all()
    assert first.zeros == again.zeros == 2  # the second reads no vectors, and knows it

    killed, other = (tmp_path / f"._index_cls_{n}.faiss.aa.tmp" for n in (1, 2))
    killed.touch()
    other.touch()  # of a job that writes now
    os.utime(killed, (0, 0))
    changed = open_search(Table(-vectors, tmp_path, "d2"), index="ivf")
    assert "other vectors" in caplog.text
    assert other.exists() and not killed.exists()
    assert changed.find(-vectors[:1], 1)[1].tolist() == [[0]]

    (file,) = tmp_path.glob("*.faiss")  # that of the vectors before is gone
    file.write_bytes(file.read_bytes()[:1000])
    assert open_search(Table(-vectors, tmp_path, "d2"), index="ivf").index.reached
    assert "cannot be read (has 1,000 bytes" in caplog.text
    (tmp_path / "_index.json").write_text('{"lists": 3}')
    open_search(Table(-vectors, tmp_path, "d2"), index="ivf")
    assert "another version" in caplog.text


def test_a_recall_that_is_not_reached_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(ivf, "MOST_LISTS", 2 / 256)
    noise = np.random.default_rng(3).normal(size=(11_000, 32)).astype(np.float32)
    facts = open_search(Table(noise, tmp_path), index="ivf").index
    assert facts is not None and not facts.reached and facts.probes == 2
    assert "below 0.95" in caplog.text and "search.index=exact" in caplog.text


def test_what_cannot_be_indexed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match="100 vectors are too few for an index of 32 lists"):
        open_search(Table(clustered(100), tmp_path), index="ivf")
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs faiss, which is not installed"):
        open_search(Table(clustered(100), tmp_path), index="ivf")
    monkeypatch.setattr(search, "EXACT_ROWS", 50)
    assert open_search(Table(clustered(100), tmp_path)).index is None
    assert "faiss is not installed" in caplog.text


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ivf, "RECALL_QUERIES", 50)

    def refused(*_: Any) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr(ivf, "atomic_path", refused)
    table = Table(clustered(10_000), tmp_path)
    assert open_search(table, index="ivf").find(table.vectors[:1], 1)[1].tolist() == [[0]]
    assert "cannot be stored" in caplog.text


def test_rules() -> None:
    assert [lists_for(rows) for rows in (1, 100, 10**6, 10**7)] == [4, 32, 2048, 8192]
    assert even_rows(10, 4).tolist() == [0, 2, 5, 7] and even_rows(3, 9).tolist() == [0, 1, 2]
    blocks = [(0, np.arange(6).reshape(3, 2)), (3, np.arange(6, 10).reshape(2, 2))]
    assert picked(lambda: iter(blocks), np.array([1, 3, 4]))[:, 0].tolist() == [2, 6, 8]
    rows = np.array([[4, 7, 9], [1, 2, 3]])
    values, left = without(rows / 10, rows, np.array([7, 8]))
    assert left.tolist() == [[4, 9], [1, 2]] and values.tolist() == [[0.4, 0.9], [0.1, 0.2]]
