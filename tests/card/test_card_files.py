"""A card is read as it was written, and what is no card is refused with a sentence."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.card.card import Card, Contender, Result, Verdict, WrongAnswer
from pipeline.card.files import read_card, write_card
from pipeline.card.shown.compare import compare_cards
from pipeline.errors import DataError
from pipeline.evaluate.score import Score, difference
from tests.card.cards import KNN, card_of, confused, contender, ids_of
from tests.s3 import S3


def rich_card(images: int = 300) -> Card:
    """With scores of three kinds, of two sets of images, and numbers of numpy."""
    generator = np.random.default_rng(0)
    confusions = generator.integers(0, 9, (40, 9)).astype(np.float64)
    squares = np.stack([generator.random(40), np.full(40, 64.0)], 1)
    dense = {
        "segmentation_linear_miou": Score(
            "segmentation_linear_miou", confusions, ids_of(40, 5), "mean_iou"
        ),
        "depth_linear_rmse": Score("depth_linear_rmse", squares, ids_of(40, 5), "root_mean"),
        "retrieval_map": Score.of_hits("retrieval_map", generator.random(images), ids_of(images)),
    }
    model = contender("model", 0.7, "runs/a", images=images, step=np.int64(1600))
    results = {
        "rank_me": Result.alone(40.5),
        "uniformity": Result.alone(math.nan),
        **model.results,
    }
    for name, score in dense.items():
        results[name] = Result.of(score, head="lr 0.1", iou=np.arange(3.0))
    return card_of(
        replace(model, results=results, cost={"embed": 12.5}),
        contender("model", 0.6, "runs/b", images=images),
        contender("step0", 0.5, "runs/a (step 0)", of="runs/a", images=images),
        images=images,
        verdict=Verdict("learnt", "Learnt."),
        remarks=("3 images could not be decoded",),
        settings={"k": [10, 20], "temperature": 0.07},
        confusion=confused(((5, 1, 0), (0, 7, 2), (1, 0, 9))),
        wrong=(WrongAnswer("0" * 32, 0, 1, 0.9, (("1" * 32, 1, 0.8),)),),
    )


def same(one: Card, other: Card) -> bool:
    """Equal but for terms and for values that JSON holds otherwise."""

    def bare(card: Card) -> Any:
        contenders = [
            (x.role, x.name, x.of, list(x.results), {k: float(v) for k, v in x.cost.items()})
            for x in card.contenders
        ]
        return replace(card, contenders=()), contenders

    return repr(bare(one)) == repr(bare(other))


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    card = rich_card()
    write_card(card, tmp_path)
    again = read_card(tmp_path)
    assert same(card, again)
    for one, other in zip(card.contenders, again.contenders, strict=True):
        for name, result in one.results.items():
            back = other.results[name]
            if result.score is None:
                assert back.score is None
                continue
            assert back.interval == result.interval
            assert back.score is not None and back.score.statistic == result.score.statistic
            assert np.array_equal(back.score.terms, result.score.terms)
            assert np.array_equal(back.score.ids, result.score.ids)
            assert back.score.value == result.score.value
            assert difference(result.score, back.score).value == 0
    assert again.contenders[0].results["rank_me"].interval.value == 40.5
    assert math.isnan(again.contenders[0].results["uniformity"].interval.value)
    assert again.contenders[0].facts == {"step": 1600}
    assert again.contenders[0].results["depth_linear_rmse"].details == {
        "head": "lr 0.1",
        "iou": [0.0, 1.0, 2.0],
    }


def test_the_files_are_plain(tmp_path: Path) -> None:
    write_card(rich_card(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "card.json", "images-2.parquet", "images.parquet",
    ]  # fmt: skip
    text = (tmp_path / "card.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["verdict"]["text"] == "Learnt." and "[5, 7, 9]" in text
    table = pq.read_table(tmp_path / "images.parquet")
    assert table.column_names[0] == "image_id" and table.num_rows == 300
    assert {f"model.{KNN}", f"model2.{KNN}", f"step0.{KNN}"} <= set(table.column_names)
    assert str(table.schema.field(f"model.{KNN}").type) == "float"
    assert str(table.schema.field("model.retrieval_map").type) == "double"
    assert table.column("image_id")[0].as_py() == ids_of(300)[0].tobytes().hex()


def test_a_card_replaces_the_one_before(tmp_path: Path) -> None:
    write_card(rich_card(), tmp_path)
    write_card(card_of(contender("model", 0.5)), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.json", "images.parquet"]
    assert len(read_card(tmp_path).contenders) == 1


def test_a_card_is_taken_by_its_folder_its_file_or_its_run(tmp_path: Path) -> None:
    write_card(rich_card(), tmp_path / "run" / "evaluate")
    for place in (
        tmp_path / "run",
        str(tmp_path / "run" / "evaluate" / "card.json"),
        f"file://{tmp_path}/run",
        f"file://{tmp_path}/run/evaluate/card.json",
    ):
        assert read_card(place).title == "photos"
    bare = read_card(tmp_path / "run", terms=False)
    assert all(x.score is None for one in bare.contenders for x in one.results.values())


def test_rows_of_confusions_are_written_in_small_groups(tmp_path: Path) -> None:
    score = Score("segmentation_linear_miou", np.ones((400, 150 * 150)), ids_of(400), "mean_iou")
    one = Contender("model", "a", "", {score.name: Result(score, Result.alone(0.1).interval)})
    write_card(card_of(one, score=score.name), tmp_path)
    about = pq.ParquetFile(tmp_path / "images.parquet").metadata
    assert about.num_row_groups >= 2 and about.num_rows == 400
    assert (tmp_path / "images.parquet").stat().st_size < 2**20
    back = read_card(tmp_path).contenders[0].results[score.name].score
    assert back is not None and back.terms.shape == score.terms.shape


def test_what_is_no_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no evaluation card in"):
        read_card(tmp_path)
    path = tmp_path / "card.json"
    path.write_text("[1, 2]")
    with pytest.raises(DataError, match="is not an evaluation card"):
        read_card(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match="holds no JSON"):
        read_card(tmp_path)
    card = rich_card()
    write_card(card, tmp_path)
    content = json.loads(path.read_text())
    for change, words in (
        ({"version": 9}, "has version 9, this code reads version 1"),
        ({"reference": None}, "is damaged"),
        ({"contenders": [{"name": "x"}]}, "is damaged"),
        ({"made": "yesterday"}, "is of another evaluation"),
        ({"files": [{"file": "gone.parquet", "images": 3, "digest": ""}]}, "lacks its file gone"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(DataError, match=words):
            read_card(tmp_path)


def test_on_an_object_store(s3: S3, tmp_path: Path) -> None:
    s3.make("cards")
    card = rich_card()
    with s3.broken("PUT .*images", 503, times=1):
        write_card(card, s3.uri("cards/run/evaluate"))
    assert sorted(s3.objects("cards", "run")) == [
        f"run/evaluate/{name}" for name in ("card.json", "images-2.parquet", "images.parquet")
    ]
    again = read_card(s3.uri("cards/run"))
    assert same(card, again)
    write_card(card_of(contender("model", 0.7, images=300), images=300), s3.uri("cards/other"))
    text = compare_cards([s3.uri("cards/run"), s3.uri("cards/other")], tmp_path)
    assert text.startswith("No verdict, for these cards cannot be compared")  # other settings
