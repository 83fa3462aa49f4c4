"""Wrong answers that a card keeps: against a plain loop over planted ones."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pipeline.card.scoring.wrong import CELLS, PAIRS, SAMPLES, SUREST, confusion_of, kept_wrong


def test_the_surest_come_first_and_each_frequent_pair_has_samples() -> None:
    generator = np.random.default_rng(0)
    truth, answers = generator.integers(-1, 12, (2, 3000)) ** 2 // 12  # some pairs are frequent
    share = generator.random(3000)
    truth[:50], answers[:50], share[:50] = 99, 98, np.linspace(0.9, 1, 50)  # sure, and one pair
    kept = kept_wrong(truth, answers, share)
    wrong = [i for i in range(3000) if truth[i] != answers[i] and min(truth[i], answers[i]) >= 0]
    surest = sorted(wrong, key=lambda i: -share[i])
    assert kept[:SUREST] == surest[:SUREST] and len(set(kept)) == len(kept)
    pairs = Counter((int(truth[i]), int(answers[i])) for i in wrong)
    frequent = pairs.most_common(PAIRS)
    least = frequent[-1][1]
    for pair, count in frequent:
        of_pair = [i for i in surest if (truth[i], answers[i]) == pair][:SAMPLES]
        assert set(of_pair) <= set(kept) or count == least  # of equally frequent pairs any is kept
    assert set(kept) <= set(wrong) and len(kept) <= SUREST + PAIRS * SAMPLES


def test_nothing_wrong_is_nothing_kept() -> None:
    same = np.arange(5)
    assert kept_wrong(same, same, np.ones(5)) == []
    assert kept_wrong(np.array([-1, 2]), np.array([1, -1]), np.ones(2)) == []


def test_a_confusion_counts_as_a_loop_does() -> None:
    generator = np.random.default_rng(1)
    truth, answers = generator.integers(-1, 7, (2, 500))
    confusion = confusion_of(truth, answers, 8)
    known = [
        (t, a) for t, a in zip(truth.tolist(), answers.tolist(), strict=True) if min(t, a) >= 0
    ]
    assert confusion.images == tuple(sum(t == i for t, _ in known) for i in range(8))
    assert confusion.right == tuple(sum(t == a == i for t, a in known) for i in range(8))
    wrong = Counter(pair for pair in known if pair[0] != pair[1])
    assert {(t, a): count for t, a, count in confusion.wrong} == wrong and confusion.is_whole
    counts = [count for _, _, count in confusion.wrong]
    assert counts == sorted(counts, reverse=True)


def test_of_21_841_classes_the_most_frequent_answers_are_kept() -> None:
    """As many as ImageNet-21k has: a matrix of them would have 477 million cells."""
    classes, generator = 21_841, np.random.default_rng(2)
    truth = np.arange(6 * classes) % classes
    answers = generator.integers(0, classes, len(truth))
    answers[truth == 21_840] = 5  # one pair is frequent
    answers[truth == 7] = [8, 9, 9, 10, 11, 12]
    confusion = confusion_of(truth, answers, classes)
    assert confusion.wrong[0] == (21_840, 5, 6) and (7, 9, 2) in confusion.wrong
    assert {t for t, _, _ in confusion.wrong} == set(truth[truth != answers].tolist())
    assert len(confusion.wrong) <= CELLS + classes and not confusion.is_whole
    assert sum(confusion.images) == len(truth)
