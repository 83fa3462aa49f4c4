"""Two cards side by side: what is told, and what must not be compared without a word."""

from __future__ import annotations

from dataclasses import replace

from pipeline.adapt.compare import compared
from pipeline.evaluate.score import difference
from tests.card.cards import KNN, card_of, contender

SEEN = {"image_size": 28, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
BEFORE = card_of(contender("model", 0.5, **SEEN))
MODEL, INIT = contender("model", 0.6, "after", **SEEN), contender("init", 0.5, **SEEN)


def test_the_lines_have_the_difference_on_the_same_images() -> None:
    comparison = compared(BEFORE, card_of(MODEL, INIT))
    scores = [one.results[KNN].score for one in (MODEL, INIT)]
    gain = difference(scores[0], scores[1])  # type: ignore[arg-type]
    before, after = dict(comparison.lines)["before"], dict(comparison.lines)["after"]
    assert "0.50" in before and "0.60" in after and f"+{gain.value:.2f}" in after
    assert not comparison.warning and comparison.rows[0][3].startswith("+0.10")


def test_what_cannot_be_compared_is_said_with_and_without_the_start_scored_anew() -> None:
    for others in ([INIT], []):
        after = card_of(MODEL, *others)
        assert not compared(BEFORE, after).warning
        other_images = replace(BEFORE, queries=replace(BEFORE.queries, digest="cc"))  # type: ignore[type-var]
        assert "other images" in compared(other_images, after).warning
        other_size = card_of(contender("model", 0.5, **(SEEN | {"image_size": 32})))
        assert "image_size 32" in compared(other_size, after).warning
    # the rows are of the same images where the start was scored anew; else only the warning stands
    scored_anew, alone = (compared(other_images, card_of(MODEL, *x)).note for x in ([INIT], []))
    assert scored_anew.startswith("The same images for both") and scored_anew.endswith("anew.")
    assert alone.startswith("The card before") and alone.endswith("are not alike.")
    assert compared(BEFORE, card_of(MODEL)).note.startswith("The same images for both")
    other_weights = card_of(contender("model", 0.4, **SEEN))
    assert "something else has changed" in compared(other_weights, card_of(MODEL, INIT)).warning
