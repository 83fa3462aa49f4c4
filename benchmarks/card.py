"""What a card costs beside its scores: writing, reading, verdict, page; and its rules on chance.

    python benchmarks/card.py [--images 50000] [--contenders 8] [--scores 15] [--draws 200]

Scores are drawn: eleven of fifteen are hits, the others means of values such as average precisions.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.card.card import Card, Contender, Result
from pipeline.card.files import read_card, write_card
from pipeline.card.shown.page import write_page
from pipeline.card.verdict import verdict_of
from pipeline.evaluate.score import Interval, Score
from tests.card.cards import KNN, card_of, ids_of
from tests.card.test_verdict import drawn_card


def drawn(images: int, contenders: int, scores: int) -> Card:
    """A card of models with scores of nothing."""
    generator, ids = np.random.default_rng(0), ids_of(images)
    models = []
    for number in range(contenders):
        results = {}
        for place in range(scores):
            values = generator.random(images)
            name = KNN if place == 0 else f"score{place}"
            score = Score.of_hits(name, values < 0.5 if 4 * place < 3 * scores else values, ids)
            results[name] = Result(score, Interval(score.value, score.value, score.value))
        models.append(Contender("model", f"model {number}", "", results))
    return card_of(*models, images=images)


def main() -> None:
    """Prints seconds and bytes, and how often the rules say each thing of shuffled labels."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("images", 50_000), ("contenders", 8), ("scores", 15), ("draws", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    card = drawn(asked.images, asked.contenders, asked.scores)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        write_card(card, folder)
        written = time.perf_counter()
        read_card(folder)
        read = time.perf_counter()
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"write {written - begin:.2f} s, read {read - written:.2f} s, {size / 1e6:.1f} MB")
        begin = time.perf_counter()
        card = replace(card, verdict=verdict_of(card))
        judged = time.perf_counter()
        write_page(card, Path(folder) / "card.html")
        print(f"verdict {judged - begin:.2f} s, page {time.perf_counter() - judged:.2f} s")
    for alone in (False, True):
        for skewed in (False, True):
            rules = Counter(
                verdict_of(drawn_card(draw, alone, skewed, shuffled=True)).rule or "no verdict"
                for draw in range(asked.draws)
            )
            sets = "leave one out" if alone else "two sets"
            print(f"shuffled labels, {sets}, {'uneven' if skewed else 'even'}: {dict(rules)}")


if __name__ == "__main__":
    main()
