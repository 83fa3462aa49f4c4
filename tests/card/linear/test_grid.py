"""The linear grid over tables of vectors: which rows train, batches of them, one rank and two."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.card.linear import rows as row_module
from pipeline.card.linear import scores
from pipeline.card.linear.ranks import Rank, on_ranks
from pipeline.card.linear.rows import Columns, Share, batches, standard_of
from pipeline.card.linear.scores import LabelledTable, linear_scores
from pipeline.embed.vectors import VectorSet, list_column, part_name, schema_of
from pipeline.errors import DataError
from pipeline.evaluate.classifiers.linear import Schedule
from pipeline.evaluate.classifiers.standard import Standard
from tests.card.linear.planted import broken

DIM, BLOCKS, CLASSES, PART = 6, 4, 3, 32


def table(
    folder: Path,
    count: int = 200,
    seed: int = 0,
    outputs: tuple[str, ...] = ("cls", "mean", "blocks"),
    **facts: Any,
) -> LabelledTable:
    """Vectors of which the mean of the patches says the class, and nothing else does."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    vectors = {
        "cls": random.normal(size=(count, DIM)),
        "mean": 3 * np.eye(CLASSES, DIM)[labels] + random.normal(size=(count, DIM)),
        "blocks": random.normal(size=(count, BLOCKS, DIM)),
    }
    vectors["blocks"][:, -1] = vectors["cls"]
    ids = random.integers(0, 256, (count, 16), np.uint8)
    about = {
        "key": f"{seed}", "model": "planted", "digest": "d", "dim": DIM, "blocks": BLOCKS,
        "grid": [2, 2], "channels": 3, "outputs": list(outputs), "dtype": "float32",
    } | facts  # fmt: skip
    schema = schema_of(about)
    parts = []
    folder.mkdir()
    for number, at in enumerate(range(0, count, PART)):
        part = slice(at, min(at + PART, count))
        columns = {
            "image_id": [bytes(x).hex() for x in ids[part]],
            "source": [""] * (part.stop - at),
            "label": labels[part],
            "row": range(at, part.stop),
            **{n: list_column(vectors[n][part], schema.field(n).type) for n in outputs},
        }
        pq.write_table(pa.table(columns, schema), folder / part_name(number))
        parts.append((part_name(number), part.stop - at))
    return LabelledTable(VectorSet(str(folder), tuple(parts), about), labels, ids)


def whole(one: LabelledTable) -> np.ndarray:
    """All inputs of heads, by the table's own reader."""
    vectors = one.vectors
    return np.concatenate(
        [vectors.read("blocks").reshape(vectors.rows, -1), vectors.read("mean")], 1
    )


PLAIN = Standard(torch.zeros(1), torch.ones(1))


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
def test_an_epoch_has_each_row_that_trains_once(
    kept_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept whole, and in windows of two parts."""
    one = table(tmp_path / "v")
    columns = Columns.of(one.vectors)
    monkeypatch.setattr(row_module, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(row_module, "WINDOW_BYTES", 2 * PART * columns.width * 4)
    training = np.arange(200) % 5 != 0  # 160 rows: ten batches of 16
    share = Share(one.vectors, columns, PLAIN)
    endless = batches(share, one.labels, training, 16, seed=0)
    epochs = []
    for _ in range(2):
        x, y = (torch.cat(each).numpy() for each in zip(*islice(endless, 10), strict=True))
        epochs.append(x)
        order = np.lexsort(x.T)
        expected = whole(one)[training]
        expected_order = np.lexsort(expected.T)
        np.testing.assert_array_equal(x[order], expected[expected_order])
        np.testing.assert_array_equal(y[order], one.labels[training][expected_order])
    assert not np.array_equal(*epochs)
    again = batches(share, one.labels, training, 16, seed=0)
    np.testing.assert_array_equal(torch.cat([x for x, _ in islice(again, 10)]), epochs[0])


def test_ranks_share_the_rows_and_a_batch_is_always_full(tmp_path: Path) -> None:
    one = table(tmp_path / "v")
    columns, training = Columns.of(one.vectors), np.ones(200, np.bool_)
    seen: list[set[bytes]] = []
    for rank in range(3):
        share = Share(one.vectors, columns, PLAIN, rank, 3)
        some = list(islice(batches(share, one.labels, training, 16, 0), 40))
        assert all(len(x) == len(y) == 16 for x, y in some)
        seen.append({row.numpy().tobytes() for x, _ in some for row in x})
    assert sum(map(len, seen)) == len(set.union(*seen)) == 200


def test_each_rank_has_rows_that_train_where_few_parts_have_any(tmp_path: Path) -> None:
    one = table(tmp_path / "v")
    columns, training = Columns.of(one.vectors), np.arange(200) // PART % 2 == 1  # every other part
    for rank in range(2):
        share = Share(one.vectors, columns, PLAIN, rank, 2)
        x, _ = next(batches(share, one.labels, training, 100, 0))  # more than a part has
        expected = {row.tobytes() for row in whole(one)[training]}
        assert len(x) == 100 and {row.numpy().tobytes() for row in x} <= expected


def test_vectors_are_standardised_by_rows_that_train(tmp_path: Path) -> None:
    one = table(tmp_path / "v")
    columns, training = Columns.of(one.vectors), np.arange(200) % 2 == 0
    standard = standard_of(one.vectors, columns, training)
    np.testing.assert_allclose(standard.mean, whole(one)[training].mean(0), atol=1e-6)
    np.testing.assert_allclose(standard.deviation, whole(one)[training].std(0), atol=1e-6)
    x, rows = Share(one.vectors, columns, standard).read(slice(32, 64), ~training)
    assert rows.tolist() == list(range(33, 64, 2))
    mean, deviation = whole(one)[training].mean(0), whole(one)[training].std(0)
    np.testing.assert_allclose(x, (whole(one)[rows] - mean) / deviation, atol=1e-5)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a score run in this process, one after the other; few steps."""
    monkeypatch.setattr(scores, "ranks_of", lambda gpu, workers: 1)
    monkeypatch.setattr(
        scores, "on_ranks", lambda function, given, ranks, gpu: [function(given, 0, 1, "cpu")]
    )
    monkeypatch.setattr(scores, "schedule_of", lambda given, ranks: Schedule(32, 200))


def test_a_planted_truth_is_learnt_where_it_stands(tmp_path: Path, here: None) -> None:
    reference, queries = table(tmp_path / "r", 300), table(tmp_path / "q", 100, seed=1)
    score, details = linear_scores(reference, queries)
    assert score.name == "linear_top1" and score.value > 0.9
    assert np.array_equal(score.ids, queries.ids)
    assert len(details["heads"]) == 52 and "mean of patches" in details["head"]
    blind = [one["asked"] for one in details["heads"] if "mean" not in one["inputs"]]
    assert max(blind) < 0.55  # a third is chance
    assert details["trained_on"] + details["chosen_on"] == 300 and details["asked"] == 100
    again, _ = linear_scores(reference, queries)
    assert np.array_equal(score.terms, again.terms)


def test_one_set_alone_and_models_that_give_less(tmp_path: Path, here: None) -> None:
    score, details = linear_scores(table(tmp_path / "a", 300, outputs=("cls", "mean")))
    assert len(details["heads"]) == 26 and score.value > 0.85
    assert details["asked"] == len(score.terms) == pytest.approx(60, abs=2)
    score, details = linear_scores(table(tmp_path / "b", 300, outputs=("cls",)))
    assert len(details["heads"]) == 13 and score.value < 0.6


def test_images_in_both_sets_and_unknown_classes(tmp_path: Path, here: None) -> None:
    reference, queries = table(tmp_path / "r", 300), table(tmp_path / "q", 100, seed=1)
    reference.ids[:40] = queries.ids[:40]
    reference.labels[:40] = 7  # a class that only images have which are also asked
    queries.labels[90:] = 5
    score, details = linear_scores(reference, queries)
    assert details["asked_too"] == 40 and details["classes"] == CLASSES
    assert details["unanswerable"] == 10 and not score.terms[90:, 0].any()
    assert score.terms[:90, 0].mean() > 0.9


def test_one_class_and_none(tmp_path: Path, here: None) -> None:
    one = table(tmp_path / "r")
    one.labels[:] = 2
    score, details = linear_scores(one)
    assert details["only_class"] == 2 and score.value == 1
    one.labels[:] = -1
    with pytest.raises(DataError, match="0 labelled images"):
        linear_scores(one)


def test_tables_of_two_models_are_not_mixed(tmp_path: Path, here: None) -> None:
    reference = table(tmp_path / "r")
    with pytest.raises(DataError, match=r"4 blocks of 6 with means of planted.*1 blocks of 6 of"):
        linear_scores(reference, table(tmp_path / "q", outputs=("cls",)))
    with pytest.raises(DataError, match="another"):
        linear_scores(reference, table(tmp_path / "o", digest="e", model="another"))


# ---- Two ranks.


def of_rank(rank: int, meetings: Any, outcomes: Any, assignment: scores.Assignment) -> None:
    """What an actor does."""
    one = Rank(gpu=False)
    if rank == 0:
        meeting = one.meet()
        meetings.put(meeting)
    else:
        meeting = meetings.get()
    outcomes.put((rank, one.run(scores.train_and_judge, assignment, rank, 2, meeting)))
    outcomes.join()  # until it was read


@pytest.mark.slow
def test_two_ranks_judge_every_image_once_and_with_the_same_grid(tmp_path: Path) -> None:
    reference, queries = table(tmp_path / "r", 300), table(tmp_path / "q", 100, seed=1)
    training = np.arange(300) % 10 != 0
    assignment = scores.Assignment(
        reference.vectors, reference.labels, training, ~training,
        queries.vectors, queries.labels, np.arange(100) != 3, CLASSES, seed=0,
    )  # fmt: skip
    context = torch.multiprocessing.get_context("spawn")
    meetings, outcomes = context.Queue(), context.JoinableQueue()
    ranks = [
        context.Process(target=of_rank, args=(rank, meetings, outcomes, assignment))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    both = dict(outcomes.get(timeout=120) for _ in ranks)
    for _ in ranks:
        outcomes.task_done()
    for process in ranks:
        process.join(60)
    assert sorted(np.concatenate([both[0].rows, both[1].rows])) == [*range(3), *range(4, 100)]
    assert min(len(both[0].rows), len(both[1].rows)) > 30
    chosen = (both[0].hits + both[1].hits) / 30
    assert chosen.max() > 0.9 and chosen.shape == (52,)
    best = int(chosen.argmax())
    for rank in both.values():  # of one grid, both are good; of two halves, neither knows the other
        assert rank.asked_hits[:, best].mean() > 0.85


# ---- On Ray.


def test_two_ranks_train_one_grid(tmp_path: Path, ray_cluster: None) -> None:
    reference, queries = table(tmp_path / "r", 300), table(tmp_path / "q", 100, seed=1)
    one, alone = linear_scores(reference, queries)
    two, both = linear_scores(reference, queries, workers=2)
    assert (alone["ranks"], both["ranks"]) == (1, 2)
    assert np.array_equal(one.ids, two.ids)
    assert one.value > 0.9 and two.value == pytest.approx(one.value, abs=0.03)
    best = [max(d["heads"], key=lambda h: h["chosen_on"]) for d in (alone, both)]
    assert best[0]["chosen_on"] == pytest.approx(best[1]["chosen_on"], abs=0.07)


def test_what_fails_on_a_rank_is_said(ray_cluster: None) -> None:
    with pytest.raises(DataError, match="planted 1 of 2 on cpu"):
        on_ranks(broken, "planted", 2, gpu=False)
    with pytest.raises(DataError, match="planted 0 of 1 on cpu"):
        on_ranks(broken, "planted", 1, gpu=False)
