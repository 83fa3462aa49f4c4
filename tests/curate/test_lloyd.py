"""k-means over files equals k-means in memory, for any files, tasks and row order."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from planted_vectors import ids_of_numbers, written

from pipeline.curate.choose import first_few, lloyd
from pipeline.curate.choose.first_few import Entries
from pipeline.curate.choose.kmeans import KMeans, fit_local
from pipeline.curate.choose.lloyd import assign
from pipeline.curate.rows.draws_by_id import BALANCE, draw
from pipeline.curate.rows.exact import unit_half
from pipeline.curate.rows.tables import ids_of, read_table, write_table
from pipeline.curate.steps.steps import Steps
from pipeline.errors import DataError, PipelineError
from tests.standins import run_here


def many_tasks(monkeypatch, group_rows=1):
    """No fit in one task, and a task for each file."""
    monkeypatch.setattr(lloyd, "LOCAL_WORK", 0)
    monkeypatch.setattr(lloyd, "GROUP_ROWS", group_rows)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    run_here(monkeypatch)


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    vectors = unit_half(rng.standard_normal((300, 12)) + 2 * np.eye(12)[rng.integers(0, 12, 300)])
    return ids_of_numbers(range(300)), vectors


@pytest.mark.long
def test_files_tasks_and_order_change_nothing(points, tmp_path: Path, monkeypatch):
    ids, vectors = points
    expected = fit_local(ids, vectors, KMeans(9, 3, 4))
    shuffled = np.random.default_rng(1).permutation(300)
    monkeypatch.setattr(lloyd, "RANGE_ELEMENTS", 4 * 12)  # sums are added up by three tasks
    members = []
    for name, files, order in (("one", 1, None), ("three", 3, shuffled)):
        if files > 1:
            many_tasks(monkeypatch)
        rows = written(tmp_path / name, ids, vectors, files, order)
        fitted = lloyd.fit(Steps(tmp_path / name / "km"), rows, KMeans(9, 3, 4))
        np.testing.assert_array_equal(fitted.centroids(), expected.centroids)
        assert list(fitted.similarity) == expected.similarity and fitted.step.cpu_s > 0
        result, counts = assign(Steps(tmp_path / name), "leaf", rows, fitted)
        small = {}
        for file in rows.names:
            table = read_table(result.folder, file)
            for image, leaf in zip(
                ids_of(table["image_id"]), table["leaf"].to_pylist(), strict=True
            ):
                small[image.tobytes()] = leaf
        members.append(small)
        np.testing.assert_array_equal(counts, np.bincount(list(small.values()), minlength=9))
    assert members[0] == members[1] and len(members[0]) == 300
    again = lloyd.fit(Steps(tmp_path / "three" / "km"), rows, KMeans(9, 3, 4))
    assert again == fitted  # and nothing but the centroids is left
    assert [p.name for p in (tmp_path / "three" / "km").iterdir()] == [f"fit-{fitted.key}"]
    # another fit under the name, once it is complete, takes its place
    other = lloyd.fit(Steps(tmp_path / "three" / "km"), rows, KMeans(8, 3, 4))
    assert [p.name for p in (tmp_path / "three" / "km").iterdir()] == [f"fit-{other.key}"]


def test_a_fit_that_was_killed_goes_on(points, tmp_path: Path, monkeypatch):
    """It ends in the third iteration; the next start runs only what is missing."""
    ids, vectors = points
    rows = written(tmp_path, ids, vectors, 2)
    many_tasks(monkeypatch)
    run, ran = Steps.run, []

    def stops(steps, name, *args, **kwargs):
        if name.endswith("means/002/new"):
            raise KeyboardInterrupt
        return goes_on(steps, name, *args, **kwargs)

    def goes_on(steps, name, *args, **kwargs):
        step = run(steps, name, *args, **kwargs)
        ran.append((name, step.reused, len(step.accounts)))
        return step

    monkeypatch.setattr(Steps, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        lloyd.fit(Steps(tmp_path / "km"), rows, KMeans(5, 3, 4))
    before = len(ran)
    monkeypatch.setattr(Steps, "run", goes_on)
    fitted = lloyd.fit(Steps(tmp_path / "km"), rows, KMeans(5, 3, 4))
    assert all(reused == tasks for _, reused, tasks in ran[before : 2 * before])
    assert ran[2 * before][1] == 0
    expected = fit_local(ids, vectors, KMeans(5, 3, 4)).centroids
    np.testing.assert_array_equal(fitted.centroids(), expected)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_any_rows(points, tmp_path: Path, count, monkeypatch):
    ids, vectors = points[0][:count], points[1][:count]
    rows = written(tmp_path, ids, vectors, 2)
    for name in ("local", "spread"):
        if name == "spread":
            many_tasks(monkeypatch)
        fitted = lloyd.fit(Steps(tmp_path / name), rows, KMeans(3, 0, 2))
        assert fitted.clusters == count and fitted.centroids().shape == (count, 12)
        _, counts = assign(Steps(tmp_path), f"{name}-leaf", rows, fitted)
        assert counts.tolist() == [1] * count


def test_left_out_rows_do_not_count(points, tmp_path: Path):
    ids, vectors = points
    rows = written(tmp_path, ids, vectors, 2)
    alive = np.arange(300) % 3 > 0
    for i, name in enumerate(rows.names):
        mine = np.arange(150 * i, 150 * (i + 1))
        write_table(_rows(mine[alive[mine]]), str(tmp_path / "kept"), name)
    fewer = rows.within(str(tmp_path / "kept"), "k", [100, 100])
    fitted = lloyd.fit(Steps(tmp_path / "km"), fewer, KMeans(5, 3, 3))
    expected = fit_local(ids[alive], vectors[alive], KMeans(5, 3, 3))
    np.testing.assert_array_equal(fitted.centroids(), expected.centroids)
    assert fewer.rows == 200 and fewer.key != rows.key


def _rows(rows):
    import pyarrow as pa

    return pa.table({"row": rows})


def test_too_many_clusters_are_refused(points, tmp_path: Path, monkeypatch):
    rows = written(tmp_path, *points)
    monkeypatch.setattr(lloyd, "TASK_ELEMENTS", 300 * 12 - 1)
    with pytest.raises(PipelineError, match=r"300 clusters of .* do not fit into a task"):
        lloyd.fit(Steps(tmp_path / "km"), rows, KMeans(2**24, 0, 2))


@pytest.mark.parametrize("local_work", [0, lloyd.LOCAL_WORK])
def test_of_more_clusters_than_rows_there_are_as_many_as_rows(
    points, tmp_path: Path, local_work, monkeypatch
):
    """What fits is told by the rows, and no pass of the seeding holds more."""
    ids, vectors = points
    rows = written(tmp_path, ids, vectors)
    monkeypatch.setattr(lloyd, "TASK_ELEMENTS", 300 * 12)
    monkeypatch.setattr(lloyd, "LOCAL_WORK", local_work)
    monkeypatch.setattr(lloyd, "GROUP_ROWS", 100)
    fitted = lloyd.fit(Steps(tmp_path / "km"), rows, KMeans(2**24, 3, 2))
    distinct = len(np.unique(vectors.view(np.uint16), axis=0))
    assert distinct <= fitted.clusters <= 300
    expected = fit_local(ids, vectors, KMeans(2**24, 3, 2))
    np.testing.assert_array_equal(fitted.centroids(), expected.centroids)


def test_damaged_vectors_are_named(points, tmp_path: Path):
    rows = written(tmp_path, *points)
    file = tmp_path / "vectors" / "00000.parquet"
    content = bytearray(file.read_bytes())
    content[2000:2040] = bytes(40)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"00000\.parquet cannot be read"):
        lloyd.fit(Steps(tmp_path / "km"), rows, KMeans(3, 0, 2))


def some_entries(name, folder, groups):
    """Entries of a file: groups by row, drawn."""
    table = read_table(folder, name, ["row", "image_id"])
    rows, ids = table["row"].to_numpy(), ids_of(table["image_id"])
    return Entries(rows % groups, draw(9, 0, ids, BALANCE), ids, rows)


@pytest.mark.parametrize("range_rows", [1, 10**6])
def test_first_of_each_group_over_files(points, tmp_path: Path, range_rows, monkeypatch):
    """Chosen over five files is what one sort of all rows chooses."""
    ids, vectors = points
    rows = written(tmp_path, ids, vectors, 5)
    quota = np.array([0, 1, 30, 1000, 7, 2, 3])
    monkeypatch.setattr(first_few, "RANGE_ROWS", range_rows)
    monkeypatch.setattr(first_few, "GROUP_ROWS", 100)
    arguments = (rows.source.folder, 7)
    reader = partial(some_entries, folder=arguments[0], groups=arguments[1])
    limits = first_few.limits(Steps(tmp_path / "first"), rows, quota, reader).load()
    got = []
    for name in rows.names:
        entries = some_entries(name, *arguments)
        got += entries.rows[limits.chosen(entries)].tolist()
    keys, expected = draw(9, 0, ids, BALANCE), []
    for group in range(7):
        members = sorted(range(group, 300, 7), key=lambda i: (keys[i], ids[i].tobytes()))
        expected += members[: quota[group]]
    assert sorted(got) == sorted(expected)
