"""What the pipeline's page in MLflow is told, against the YAML and a card made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from pipeline.card.card import Card, Contender, Result, SetFacts, Verdict
from pipeline.config.load import load
from pipeline.evaluate.score import Score
from pipeline.stages.tracked import pipeline_page

RECIPES = Path(__file__).parents[2] / "configs"


def test_what_a_recipe_changes_is_what_stands_in_it() -> None:
    """A recipe without a preset sets nothing but what its lines say."""
    path = RECIPES / "vits16.yaml"
    written = {
        f"{section}.{name}"
        for section, fields in yaml.safe_load(path.read_text()).items()
        if isinstance(fields, dict)
        for name in fields
    }
    changed = pipeline_page.changed_fields(load([str(path), "run.name=x", "track.register=y"]))
    assert set(changed) <= {name for name in written if not name.startswith("resources.")}
    assert changed  # and not all of them: a line may repeat a default
    one = pipeline_page.changed_fields(load([str(path), "optim.lr=0.125"]))
    assert one["optim.lr"] == "0.125"
    differs = {name for name in {*one, *changed} if one.get(name) != changed.get(name)}
    assert differs == {"optim.lr"}


def card(verdict: Verdict, labelled: int = 8) -> Card:
    right = np.array([True] * 6 + [False] * 2)
    score = Score.of_hits("knn20_top1", right, np.zeros((8, 16), np.uint8))
    results = {"knn20_top1": Result.of(score)}
    return Card(
        title="card",
        made="2026-01-01",
        score="knn20_top1",
        reference=SetFacts("train | all", "a" * 32, 90, labelled),
        queries=SetFacts("test", "b" * 32, 8, labelled),
        contenders=(
            Contender("model", "runs/x (step 60)", results=results),
            Contender("colours", "a colour histogram", results=results),
        ),
        verdict=verdict,
    )


def test_the_note_begins_with_the_verdict_and_has_each_score() -> None:
    verdict = Verdict("learnt", "Learnt: k-NN 0.75.")
    text = pipeline_page.note(card(verdict), {"pack": "a | b", "evaluate": "kNN"}, verdict)
    lines = text.splitlines()
    assert lines[0] == "Learnt: k-NN 0.75."
    plain = [line.replace("\u00a0", "") for line in lines]
    assert "| what | k-NN |" in plain
    assert any(line.startswith("| **runs/x (step 60)** | 0.75 ± ") for line in plain)
    assert any(line.startswith("| a colour histogram | 0.75") for line in plain)
    assert "* **pack** a | b" in lines
    assert pipeline_page.note(None, {"pack": "3 images"}, Verdict("", "")).startswith("3 images")


def test_tags_say_the_mood_and_whether_there_are_labels() -> None:
    good = pipeline_page.verdict_tags(card(Verdict("learnt", "Learnt.")))
    assert good == {"verdict": "good", "verdict.rule": "learnt", "has_labels": "true"}
    bad = pipeline_page.verdict_tags(card(Verdict("no_better_than_colours", "No better.")))
    assert bad["verdict"] == "bad"
    none = pipeline_page.verdict_tags(card(Verdict("", "No verdict."), labelled=0))
    assert none == {"verdict": "open", "verdict.rule": "none", "has_labels": "false"}
    assert pipeline_page.tags_of(load(["run.name=x", "curate.preset="]))["curated"] == "no"
    sets = pipeline_page.datasets_of(card(Verdict("", "")))
    assert [(one.name, one.images) for one in sets] == [("test", 8), ("train | all", 90)]


def test_names_are_as_short_as_they_can_be() -> None:
    assert pipeline_page.short_name("/home/ann/photos/test/") == "photos/test"
    assert pipeline_page.short_name("photos/") == "photos/"
    assert pipeline_page.short_name("builtin:photos/train") == "builtin:photos/train"
