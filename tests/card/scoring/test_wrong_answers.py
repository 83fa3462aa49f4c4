"""Wrong answers that a card keeps: against a plain loop over planted ones."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pipeline.card.scoring.wrong import PAIRS, SAMPLES, SUREST, kept_wrong


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
