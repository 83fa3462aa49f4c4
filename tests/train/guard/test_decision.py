"""Falls below the start: against a reference of a few lines, on answers whose truth is planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.guard.answers import Answers, from_bytes, to_bytes
from pipeline.evaluate.guard.measure import structure_of
from pipeline.evaluate.guard.structure import Structure, left_of, shared_neighbours
from pipeline.evaluate.score import Score
from pipeline.train.guard import memory, words
from pipeline.train.guard.decision import LEFT, Compared, Limits, compared, row_after
from pipeline.train.guard.guard import TRIES, Guard
from pipeline.train.guard.memory import Ended

LIMITS = Limits(falls=2, least=0.5, keep_fall=0.01)
N = 400
NAME = "knn20_top1"


def ids(count: int = N, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


def score(hits: np.ndarray, name: str = NAME, seed: int = 0) -> Score:
    return Score.of_hits(name, hits, ids(len(hits), seed))


def answers(share: float, seed: int, keep: float | None = None) -> Answers:
    """Hits of a share of the images, drawn; and of `keep` on those of guard.keep."""
    draw = np.random.default_rng([seed, 7])
    kept = None if keep is None else score(np.arange(N) < keep * N, seed=9)
    return Answers(score(draw.random(N) < share), None, kept)


def reference_fell(now: np.ndarray, start: np.ndarray) -> bool:
    """The paired bootstrap in five lines, without imaginary images."""
    draw = np.random.default_rng(1)
    rows = draw.integers(0, len(now), (4000, len(now)))
    differences = (now[rows].astype(float) - start[rows]).mean(1)
    return bool(np.percentile(differences, 97.5) < 0)


def guard_of(folder: Path, limits: Limits = LIMITS, key: str = "a") -> Guard:
    return Guard(limits, folder, key, dict)


def test_falls_are_those_of_a_plain_paired_bootstrap() -> None:
    start = answers(0.7, 0)
    assert start.score is not None
    agree = 0
    shares = np.linspace(0.4, 0.8, 30)
    for seed, share in enumerate(shares, 1):
        now = answers(float(share), seed)
        assert now.score is not None
        result = compared(now, start, LIMITS).score
        assert result is not None
        agree += result.fell == reference_fell(now.score.terms[:, 0], start.score.terms[:, 0])
        assert result.gain.value == pytest.approx(now.score.value - start.score.value)
    assert agree >= 29  # one may lie on the border of two bootstraps
    assert compared(start, start, LIMITS).may_be_best


def reference_end(fell: list[bool], falls: int) -> int | None:
    """The number of the evaluation that ends a training."""
    for i in range(falls - 1, len(fell)):
        if all(fell[i - falls + 1 : i + 1]):
            return i
    return None


@pytest.mark.parametrize("falls", [1, 2, 3])
def test_a_row_of_falls_ends_and_an_interrupted_one_does_not(falls: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(falls)
    good, bad = answers(0.7, 0), answers(0.2, 1)
    for case in range(20):
        fell = [bool(x) for x in draw.random(8) < 0.5]
        folder = tmp_path / str(case)
        guard = guard_of(folder, Limits(falls, 0.5, 0.01))
        guard.begin(good)
        ended = None
        for i, one in enumerate(fell):
            guard.compare(10 * i, bad if one else good)
            if guard.ended is not None and ended is None:
                ended = i
                assert guard.ended.step == 10 * i
        assert ended == reference_end(fell, falls)


def test_falls_are_counted_across_a_restart_and_a_step_counts_once(tmp_path: Path) -> None:
    good, bad = answers(0.7, 0), answers(0.2, 1)
    guard = guard_of(tmp_path)
    assert guard.waits and guard.start is None
    guard.begin(good)
    guard.compare(20, bad)
    again = guard_of(tmp_path)
    assert not again.waits and again.start is not None and again.falls.rows["score"] == [20]
    again.compare(20, bad)  # the checkpoint of step 20 is evaluated once more after the restart
    assert again.ended is None and again.falls.rows["score"] == [20]
    again.compare(40, bad)
    assert again.ended is not None and again.ended.step == 40
    assert "fell from 0.69" in again.ended.why and "step 40, after step 20" in again.ended.why
    assert guard_of(tmp_path).ended == again.ended == memory.ended(tmp_path)
    assert guard_of(tmp_path, key="b").ended == again.ended


def test_another_key_is_said_and_compares_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = guard_of(tmp_path)
    guard.begin(answers(0.7, 0))
    guard.compare(20, answers(0.2, 1))
    other = guard_of(tmp_path, key="b")
    assert "the start was evaluated with other images or settings" in caplog.text
    assert other.waits and other.start is None and other.falls.rows["score"] == []
    assert other.compare(40, answers(0.2, 1)) == Compared()
    assert other.ended is None


def test_other_images_and_scores_are_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = guard_of(tmp_path)
    guard.begin(answers(0.7, 0))
    for other in (
        Answers(score(np.zeros(N), seed=3)),
        Answers(score(np.zeros(N), "logistic_top1")),
        Answers(None, structure(0)),
        answers(0.2, 1, keep=0.5),
    ):
        assert guard.compare(20, other) == Compared()
    assert guard.falls.rows["score"] == [] and guard.ended is None
    assert len([r for r in caplog.records if "compares nothing" in r.getMessage()]) == 4


def test_what_is_kept_is_measured_and_more_than_is_allowed_ends(tmp_path: Path) -> None:
    guard = guard_of(tmp_path)
    guard.begin(answers(0.7, 0, keep=0.8))
    little = guard.compare(10, answers(0.7, 0, keep=0.795))
    assert little.may_be_best and little.keep is not None and not little.keep.fell
    unsure = guard.compare(20, answers(0.9, 0, keep=0.785))
    assert not unsure.may_be_best  # 1.5 points by its value
    assert unsure.keep is not None
    for step in (30, 40):
        lost = guard.compare(step, answers(0.9, 0, keep=0.6))
        assert lost.keep is not None and lost.keep.fell and not lost.may_be_best
    assert guard.ended is not None and "of guard.keep fell from 0.8000" in guard.ended.why
    metrics = guard.metrics(lost)
    assert metrics["guard/keep_gain"] == pytest.approx(-0.2) and metrics["guard/keep_falls"] == 2
    never = guard_of(tmp_path / "never", Limits(2, 0.5, 1.0))
    never.begin(answers(0.7, 0, keep=1.0))
    for step in (10, 20, 30):
        assert never.compare(step, answers(0.9, 0, keep=0.0)).may_be_best
    assert never.ended is None


def test_a_start_that_never_comes_turns_the_guard_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard = guard_of(tmp_path)
    for _ in range(TRIES):
        assert guard.waits
        guard.failed()
    assert not guard.waits and "the guard is off" in caplog.text
    assert guard.compare(20, answers(0.2, 1)) == Compared()


def test_a_row_holds_the_steps_before_it() -> None:
    assert row_after([], 10, True) == [10]
    assert row_after([10], 20, True) == [10, 20]
    assert row_after([10, 20], 20, True) == [10, 20]
    assert row_after([10, 20, 30], 20, True) == [10, 20]
    assert row_after([10, 20], 30, False) == []


# ---- Without labels.


def features(seed: int, noise: float = 0.0, width: int = 16) -> LabelledFeatures:
    base = torch.randn(N, width, generator=torch.Generator().manual_seed(0))
    other = torch.randn(N, width, generator=torch.Generator().manual_seed(seed + 1))
    mixed = (1 - noise) * base + noise * other
    return LabelledFeatures(mixed, torch.full((N,), -1), ids())


def structure(seed: int, noise: float = 0.0, smooth: float | None = 0.4) -> Structure:
    values = np.zeros(0) if smooth is None else np.full(64, smooth)
    return structure_of(features(seed, noise), 10, values)


def test_shared_neighbours_are_those_of_sets() -> None:
    now, start = structure(0, 0.3).neighbours, structure(0).neighbours
    expected = [len({*a} & {*b}) / 10 for a, b in zip(now.tolist(), start.tolist(), strict=True)]
    chance = 10 / (N - 1)
    assert shared_neighbours(now, start) == pytest.approx(
        (np.asarray(expected) - chance) / (1 - chance)
    )
    x = torch.nn.functional.normalize(features(0).features.double(), dim=1)
    similar = x @ x.T
    similar.fill_diagonal_(-torch.inf)
    assert [set(r) for r in start.tolist()] == [set(r) for r in similar.topk(10)[1].tolist()]


def test_what_is_left_is_the_mean_of_its_parts() -> None:
    start = structure(0)
    whole = left_of(start, start)
    assert whole.interval.value == pytest.approx(1) and whole.interval.low == pytest.approx(1)
    now = left_of(structure(0, 0.5, smooth=0.1), start)
    parts = now.parts
    assert parts["smoothness"] == pytest.approx(0.25)
    product = parts["rank"] * parts["neighbours"] * parts["smoothness"]
    assert now.interval.value == pytest.approx(product ** (1 / 3))
    assert now.interval.low < now.interval.value < now.interval.high
    assert set(left_of(structure(0, 0.5, None), structure(0, 0, None)).parts) == {
        "rank",
        "neighbours",
    }
    flat = structure(0, smooth=0.0)  # patches that were not smooth say nothing
    assert "smoothness" not in left_of(flat, flat).parts
    collapsed = structure_of(
        LabelledFeatures(torch.zeros(N, 16), torch.full((N,), -1), ids()), 10, np.zeros(64)
    )
    assert left_of(collapsed, start).interval.value == 0
    with pytest.raises(DataError, match="not of the same images"):
        left_of(structure(0, smooth=None), start)


def test_without_labels_a_gentle_change_is_none_and_unrelated_features_are_a_fall(
    tmp_path: Path,
) -> None:
    guard = guard_of(tmp_path)
    guard.begin(Answers(None, structure(0)))
    gentle = guard.compare(10, Answers(None, structure(3, 0.25)))
    assert gentle.score is not None and gentle.score.name == LEFT and not gentle.score.fell
    for step in (20, 30):
        lost = guard.compare(step, Answers(None, structure(3, 1.0)))
        assert lost.score is not None and lost.score.fell
    assert guard.ended is not None and "less than guard.least=0.5" in guard.ended.why
    assert {"guard/rank", "guard/neighbours", "guard/smoothness"} <= set(guard.metrics(lost))


# ---- Beside the checkpoints.


def test_answers_come_back_to_the_bit(tmp_path: Path) -> None:
    for one in (answers(0.7, 0, keep=0.5), Answers(None, structure(0)), Answers()):
        back, key = from_bytes(to_bytes(one, "k"))
        assert key == "k" and bool(back) == bool(one)
        for name in ("score", "keep"):
            was, now = getattr(one, name), getattr(back, name)
            assert (was is None) == (now is None)
            if was is not None:
                assert was.name == now.name and was.images == now.images
                assert np.array_equal(was.terms, now.terms)
        if one.structure is not None and back.structure is not None:
            assert left_of(back.structure, one.structure).interval.value == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", to_bytes(Answers(), "k")[:60]])
def test_a_damaged_start_is_said_and_evaluated_again(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / memory.START).write_bytes(content)
    (tmp_path / memory.STATE).write_text('{"rows": 3, "ended": []}')
    guard = guard_of(tmp_path)
    assert guard.waits and guard.falls.rows == {"score": [], "keep": []}
    assert "is not used" in caplog.text and "counted anew" in caplog.text


def test_the_sentence_has_numbers_and_what_to_change() -> None:
    ended = Ended(40, "knn20_top1 fell from 0.7 at the start to 0.5 at step 40")
    kept = words.sentence(
        ended, 45, 200, 2e-3, {"step": 0, "score": 0.7, "name": "eval/knn20_top1"}
    )
    assert kept.startswith("ended by the guard after step 45 of 200: knn20_top1 fell")
    assert "the weights it started from are kept (knn20_top1 0.7000)" in kept
    assert "lower optim.lr (it was 0.002)" in kept
    later = words.sentence(
        ended, 200, 200, 2e-3, {"step": 20, "score": 0.7, "name": "eval/knn20_top1"}
    )
    assert "at the end of all 200 steps" in later and "checkpoint of step 20 is kept" in later
    assert "no checkpoint was compared" in words.sentence(ended, 3, 9, 1.0, None)
