"""Two cards on one page: a planted difference is told, and what cannot be compared is said."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.card.card import Card, Result, SetFacts
from pipeline.card.files import write_card
from pipeline.card.shown.compare import compare_cards, compared, differences_of, distinct, merged
from pipeline.errors import DataError
from pipeline.evaluate.score import Score
from tests.card.cards import KNN, card_of, contender, hits, ids_of


def card(share: float, name: str, **fields: Any) -> Card:
    return card_of(
        contender("model", share, name, dim=384),
        contender("step0", 0.5, of=name),
        contender("colours", 0.4),
        **({"settings": {"k": 20}} | fields),
    )


def written(folder: Path, *cards: Card) -> list[Path]:
    places = [folder / f"run{number}" for number in range(len(cards))]
    for place, one in zip(places, cards, strict=True):
        write_card(one, place / "evaluate")
    return places


def test_a_planted_difference_is_told(tmp_path: Path) -> None:
    places = written(tmp_path, card(0.70, "runs/a"), card(0.80, "runs/b"))
    text = compare_cards(places, tmp_path / "out")
    assert text.startswith("Best: runs/b, k-NN 0.80 ± 0.02; runs/a 0.70")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert text in page
    assert re.search(r"<td [^>]*>runs/b</td><td [^>]*>0.10 ± 0.03</td>", page)
    assert "runs/a and runs/b" in page
    assert page.count("colours") == 1  # once, for both


def test_the_difference_is_of_pairs_of_images() -> None:
    """A model that is right where the other is, and on 40 of 2,000 more, is told from it."""
    one = hits(0.7)
    more = one.copy()
    more[(~one).nonzero()[0][:40]] = True
    cards = [card(0.7, "a"), card(0.7, "b")]
    for number, right in enumerate((one, more)):
        result = Result.of(Score.of_hits(KNN, right, ids_of(2000)))
        model = replace(cards[number].contenders[0], results={KNN: result})
        cards[number] = replace(cards[number], contenders=(model, *cards[number].contenders[1:]))
    (row,) = compared(merged(cards))
    assert row.gain.interval.value == pytest.approx(0.02) and row.better == "b"
    assert row.gain.interval.margin < 0.01 < row.one.results[KNN].interval.margin


def test_a_model_that_was_chosen_has_to_be_better_by_more(tmp_path: Path) -> None:
    """By the score that decides, which chose it; another score did not."""
    for best_of, start in ((1, "Best: runs/b"), (11, "runs/b and runs/a cannot be told apart")):
        cards = []
        for name, share, facts in (("runs/a", 0.7, {}), ("runs/b", 0.735, {"best_of": best_of})):
            one = card_of(contender("model", share, name, **facts), settings={"k": 20})
            (model,) = one.contenders
            logistic = Result.of(Score.of_hits("logistic_top1", hits(share), ids_of(2000)))
            results = {**model.results, "logistic_top1": logistic}
            cards.append(replace(one, contenders=(replace(model, results=results),)))
        assert compare_cards(written(tmp_path, *cards), tmp_path / "out").startswith(start)
        page = (tmp_path / "out" / "compare.html").read_text()
        assert ("the best of 11 evaluations" in page) == (best_of == 11)
        rows = {row.score: row.better for row in compared(merged(cards))}
        assert rows["logistic_top1"] == "runs/b"
        assert rows[KNN] == ("runs/b" if best_of == 1 else "cannot be told")


def test_what_is_said_of_a_difference_agrees_with_its_interval() -> None:
    """The chosen model is behind: only the end that would favour it is wider."""
    one = card_of(contender("model", 0.735, "runs/a"))
    other = card_of(contender("model", 0.70, "runs/b", best_of=30))
    (row,) = compared(merged([one, other]))
    assert row.better == "runs/a" and row.ahead.low > 0
    assert row.gain.interval.value - row.gain.interval.low > row.ahead.margin


def test_a_start_that_is_not_on_the_cards_is_missed(tmp_path: Path) -> None:
    cards = [
        card_of(
            contender("model", share, name, started_from="timm:x"),
            contender("untrained", 0.3, of=name),
            settings={"k": 20},
        )
        for name, share in (("runs/a", 0.74), ("runs/b", 0.65))
    ]
    text = compare_cards(written(tmp_path, *cards), tmp_path / "out")
    assert "what it started from (timm:x) has no k-NN on this card" in text


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = written(tmp_path, card(0.70, "runs/a"), card(0.80, "runs/a"))
    text = compare_cards([str(one) for one in places], tmp_path / "out")
    assert "runs/a (" in text and "run1)" in text
    renamed = distinct([card(0.7, "x"), card(0.8, "x")], ["same", "same"])
    models = [one.contenders[0].name for one in renamed]
    assert models == ["x (card 1)", "x (card 2)"]
    assert [one.contenders[1].of for one in renamed] == models


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"score": "linear_top1"}, "decides by"),
        ({"settings": {"k": 10}}, "The setting k is 20 on card 1 and 10 on card 2"),
        ({"queries": SetFacts("other/val", "zz", 1500, 1500)}, "is other/val (1,500 images)"),
        ({"queries": None}, "is not there"),
    ],
)
def test_cards_that_cannot_be_compared_are_not(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    places = written(tmp_path, card(0.70, "runs/a"), card(0.80, "runs/b", **fields))
    text = compare_cards(places, tmp_path / "out")
    assert text.startswith("No verdict, for these cards cannot be compared")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert words in page and "Best" not in page and "0.10 ±" not in page
    assert not list(differences_of([card(0.7, "a"), card(0.8, "b")]))


def test_scores_of_other_images_are_left_out_and_said(tmp_path: Path) -> None:
    def with_linear(one: Card, seed: int) -> Card:
        score = Score.of_hits("linear_top1", hits(0.8, 100), ids_of(100, seed))
        model = one.contenders[0]
        results = {**model.results, "linear_top1": Result.of(score)}
        return replace(one, contenders=(replace(model, results=results), *one.contenders[1:]))

    first = with_linear(card(0.7, "runs/a"), 1)
    places = written(tmp_path, first, with_linear(card(0.8, "runs/b"), 2))
    compare_cards(places, tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "linear layer: of other images" in page
    places = written(tmp_path, first, card(0.8, "runs/b"))
    compare_cards(places, tmp_path / "out")
    assert "linear layer: not on all cards" in (tmp_path / "out" / "compare.html").read_text()


def test_recipes_and_facts_that_differ_are_shown(tmp_path: Path) -> None:
    places = written(tmp_path, card(0.70, "runs/a"), card(0.80, "runs/b"))
    for place, rate in zip(places, (0.001, 0.004), strict=True):
        text = f"run:\n  name: {place.name}\noptim:\n  lr: {rate}\n  steps: 100\n"
        (place / "config.yaml").write_text(text)
    compare_cards(places, tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "optim.lr" in page and "0.004" in page
    assert "optim.steps" not in page and "run.name" not in page
    assert "The networks were used in the same way." in page


def test_three_cards_are_held_against_the_first(tmp_path: Path) -> None:
    cards = [card(share, f"runs/{n}") for n, share in zip("abc", (0.7, 0.8, 0.81), strict=True)]
    text = compare_cards(written(tmp_path, *cards), tmp_path / "out")
    assert text.startswith("runs/c and runs/b cannot be told apart on these 2,000 images")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "runs/a and runs/b" in page and "runs/a and runs/c" in page


def test_one_card_is_not_compared(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one card alone"):
        compare_cards(written(tmp_path, card(0.7, "a")), tmp_path)
    with pytest.raises(DataError, match="no evaluation card"):
        compare_cards([tmp_path / "x", tmp_path / "y"], tmp_path)
