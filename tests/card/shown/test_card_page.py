"""The page of a card: the verdict on top, all numbers as text, and a bounded number of pictures."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.card.card import Card, Result, Verdict, WrongAnswer
from pipeline.card.scoring.wrong import PAIRS, SAMPLES
from pipeline.card.shown.mistakes import WRONG, pictures_of
from pipeline.card.shown.page import mood_of, write_page
from pipeline.card.shown.picture import WIDTH, card_picture
from pipeline.card.words import SAYS, UNLABELLED, is_lower_better, title_of, with_margin
from pipeline.embed.embedders import EmbedderSpec
from pipeline.errors import DataError
from pipeline.evaluate.score import Interval, Score
from tests.card.cards import IMAGES, card_of, confused, contender, hits, ids_of
from tests.data import encoded, noise
from tests.report.test_page import Balanced
from tests.search.tables import write_shard, write_vectors

SCORES = """
    knn10_top1 knn20_top1 logistic_top1 linear_top1 few_shot1_top1 few_shot5_top1 retrieval_map
    retrieval_recall1 retrieval_recall10 copies_recall1 copies_map segmentation_linear_miou
    segmentation_nearest_miou depth_linear_rmse depth_linear_rel depth_linear_delta1
    depth_head_rmse finetune_top1 rank_me feature_std effective_rank uniformity alignment
    patch_smoothness
""".split()  # noqa: SIM905


def names(prefix: str, count: int) -> list[str]:
    """Ids, 32 hex digits each."""
    return [f"{prefix}{number:031d}" for number in range(count)]


def shown_card(classes: int = 3, wrong: int = 40) -> Card:
    """A trained model, its step 0 and colours, with mistakes."""
    generator = np.random.default_rng(0)
    confusion = generator.integers(1, 20, (classes, classes)) + 50 * np.eye(classes, dtype=int)
    pairs = zip(names("a", wrong), names("b", wrong), strict=True)
    answers = tuple(
        WrongAnswer(query, number % classes, (number + 1) % classes, 0.9, ((near, 0, 0.83),) * 9)
        for number, (query, near) in enumerate(pairs)
    )
    model = contender("model", 0.74, "runs/<photos>", dim=384, image_size=224, digest="d" * 32)
    other = Score.of_hits("linear_top1", hits(0.8), ids_of(IMAGES))
    results = {**model.results, "linear_top1": Result.of(other), "rank_me": Result.alone(40.0)}
    return card_of(
        replace(model, results=results, cost={"embed": 100.0, "knn": 2.5}),
        contender("step0", 0.66, of="runs/<photos>"),
        contender("colours", 0.5),
        verdict=Verdict("learnt", "Learnt: k-NN 0.74 ± 0.02, untrained 0.66."),
        confusion=confused(confusion),
        wrong=answers,
        settings={"k": 20, "classes": [f"kind {i}" for i in range(classes)]},
        remarks=("3 images could not be decoded",),
    )


def page_of(card: Card, path: Path, image_of: Any = None) -> str:
    write_page(card, path, image_of)
    assert path.stat().st_size < 2_000_000
    page = path.read_text()
    Balanced(page)
    assert not re.search(r"https?://|@import|url\(|<script src|<link", page)
    assert page.count("<script>") == page.count('<button class="copy"') <= 1  # of the lines to copy
    assert not re.search(r"\b[0-9a-f]{32}\b", page)
    return page


def test_the_page_begins_with_the_verdict_and_has_every_number(tmp_path: Path) -> None:
    page = page_of(shown_card(), tmp_path / "card.html")
    body = page.partition("</header>")[2]
    assert "Learnt: k-NN 0.74 ± 0.02, untrained 0.66." in body.partition("</section>")[0]
    assert page.count("<h1>") == 1 and "runs/&lt;photos&gt;" in page and "<photos>" not in page
    for words in ("0.74 ± 0.02", "0.66 ± 0.02", "0.80 ± 0.02", "untrained, step 0", "colours"):
        assert words in page, words
    assert "100 images/s" not in page and ">100<" in page  # 10,000 images in 100 s
    assert "3 images could not be decoded." in page and "embedder_of(" in page
    assert "that many are good: noise uses all" in page  # what RankMe cannot say


def test_whiskers_are_where_the_intervals_are(tmp_path: Path) -> None:
    card = shown_card()
    page = page_of(card, tmp_path / "card.html")
    interval = card.contenders[0].results[card.score].interval
    left, width = re.findall(r'<u style="left:([\d.]+)%;width:([\d.]+)%', page)[0]
    assert float(left) == pytest.approx(100 * interval.low, abs=0.01)
    assert float(width) == pytest.approx(100 * (interval.high - interval.low), abs=0.01)


def test_classes_are_counted_as_a_loop_counts_them(tmp_path: Path) -> None:
    card = shown_card()
    page = page_of(card, tmp_path / "card.html")
    table = page.partition("Classes, the worst first")[2].partition("</table>")[0]
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("<tr>")[2:]]
    expected = []
    for truth, (images, right) in enumerate(
        zip(card.confusion.images, card.confusion.right, strict=True)
    ):
        count, taken = max((n, -answer) for i, answer, n in card.confusion.wrong if i == truth)
        expected.append((right / images, [
            f"kind {truth}", str(images), str(right), f"{right / images:.2f}",
            f"kind {-taken} ({count})",
        ]))  # fmt: skip
    assert rows == [row for _, row in sorted(expected)]


def test_pictures_are_asked_for_by_id_and_their_number_is_bounded(tmp_path: Path) -> None:
    asked: list[str] = []

    def image_of(image_id: str) -> Any:
        asked.append(image_id)
        return None if image_id == names("b", 1)[0] else noise(1, 32)

    page = page_of(shown_card(), tmp_path / "card.html", image_of)
    pictures = page.count("<img")
    assert 0 < pictures <= WRONG * 7 + PAIRS * SAMPLES
    assert page.count("no picture") == 6  # the one that is not there, each time it is a neighbour
    assert "✗ kind 0" in page and "✓ kind 0" in page and "cosine 0.83" in page
    assert "kind 1, taken for kind 2" in page


def test_many_classes_are_cut_and_said(tmp_path: Path) -> None:
    page = page_of(shown_card(classes=260, wrong=0), tmp_path / "card.html")
    assert "and 60 more rows" in page and "Answers of each class" not in page


def test_large_pictures_do_not_make_the_page_large(tmp_path: Path) -> None:
    page_of(shown_card(), tmp_path / "card.html", lambda image_id: noise(int(image_id[1:]), 500))


def test_a_card_of_nothing_but_numbers_is_a_page(tmp_path: Path) -> None:
    bare = card_of(contender("model", None, numbers={"rank_me": float("nan")}), labelled=0)
    page = page_of(replace(bare, queries=None), tmp_path / "card.html")
    assert "No verdict." in page and "Mistakes" not in page and "RankMe" in page
    assert card_picture(bare).shape[1] == WIDTH


def test_the_mood_is_that_of_the_verdict() -> None:
    def mood(rule: str, text: str = "") -> str:
        return mood_of(Verdict(rule, text))

    assert mood("learnt") == mood("best_model", "Best: a.") == "good"
    assert mood("collapsed") == mood("no_better_than_colours") == "bad"
    assert mood("best_model", "Best: a. No verdict: b.") == "open"
    assert mood("") == mood("equal_models") == mood("learnt_little") == "open"


def test_every_score_has_a_title_and_says_what_it_can_and_cannot() -> None:
    assert set(UNLABELLED) <= set(SCORES)
    for score in SCORES:
        title = title_of(score)
        assert title != score.replace("_", " ") or score in ("effective_rank", "uniformity",
            "alignment", "patch_smoothness"), score  # fmt: skip
        assert title in SAYS, title
    assert {s for s in SCORES if is_lower_better(s)} == {
        "depth_linear_rmse", "depth_linear_rel", "depth_head_rmse", "uniformity", "alignment",
    }  # fmt: skip


@pytest.mark.parametrize(
    "value, margin, words",
    [
        (0.7421, 0.0196, "0.74 ± 0.02"),
        (0.7421, 0.0021, "0.742 ± 0.002"),
        (0.7421, 0.2, "0.74 ± 0.20"),
        (0.7421, 0.0, "0.74"),
        (412.3, 31.2, "412 ± 31"),
        (0.99991, 0.00001, "0.9999 ± 0.0000"),
    ],
)
def test_numbers_have_the_digits_that_their_interval_bears(
    value: float, margin: float, words: str
) -> None:
    assert with_margin(Interval(value, value - margin, value + margin)) == words


def test_the_picture_has_bars_as_long_as_their_values() -> None:
    card = shown_card()
    picture = card_picture(card)
    assert picture.dtype == np.uint8 and picture.shape[1:] == (WIDTH, 3)
    blue = (picture == (37, 99, 201)).all(2)
    grey = (picture == (150, 157, 168)).all(2)
    lengths = sorted({int(row.sum()) for row in blue if row.sum() > 50})
    full = 900 - 150 - 270
    assert lengths[-1] == pytest.approx(0.8 * full, abs=12)  # the linear layer; whiskers cover some
    row = next(row for row in blue if row.sum() > 50)
    assert np.flatnonzero(row)[-1] - np.flatnonzero(row)[0] == pytest.approx(0.74 * full, abs=12)
    assert grey.any()


def test_pictures_come_from_the_shards_of_both_sets(tmp_path: Path) -> None:
    sets = []
    for number in range(2):
        images = [encoded(noise(10 * number + i, 32)) for i in range(4)]
        write_shard(tmp_path / f"{number}.parquet", images)
        folder = tmp_path / f"vectors{number}"
        sets.append(write_vectors(folder, tmp_path / f"{number}.parquet", EmbedderSpec()))
    image_of = pictures_of([one.images() for one in sets])
    for vectors in sets:
        picture = image_of(str(vectors.ids()[0]))
        assert isinstance(picture, bytes) and picture.startswith(b"\xff\xd8")
    assert image_of("0" * 32) is None


def test_a_page_without_its_images_is_still_a_page(tmp_path: Path) -> None:
    def image_of(image_id: str) -> Any:
        raise DataError("the images have changed")

    page = page_of(shown_card(), tmp_path / "card.html", image_of)
    assert "no picture" in page and "<img" not in page and "0.74 ± 0.02" in page
