"""What each round of a recipe is, what is refused, and where its runs and files go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import rounds
from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.context import Context
from pipeline.errors import ConfigError
from pipeline.storage.mirror import _belongs
from pipeline.storage.run_folder import RunFolder
from pipeline.track import driver
from pipeline.track.settings import TrackSettings

SEEDS = "retrieve.seeds.mine=seeds/"
RECIPES: dict[str, list[str]] = {
    "balance": ["curate.preset=balanced", "balance.images=10"],
    "retrieval": ["curate.preset=dedup", SEEDS, "mix.by=proportion", "mix.as_is=0.5"],
    "paper": ["curate.preset=lvd142m", SEEDS],
    "paper with SSCD": ["curate.preset=lvd142m", SEEDS, "curate.copy_embedder=sscd.onnx"],
    "sizes": ["curate.preset=balanced", "balance.images=10", "curate.image_size=32",
              "curate.batch_size=8"],
    "queries": ["curate.preset=lvd142m", SEEDS, "evaluate.queries=test/"],
}  # fmt: skip


def recipe(tmp_path: Path, *more: str) -> tuple[Config, RunFolder]:
    config = load(["run.name=mine", f"run.folder={tmp_path}", "data.source=photos/", *more])
    return config, RunFolder.of(config.run.folder, config.run.name)


@pytest.mark.parametrize("name", RECIPES)
def test_each_round_is_a_recipe_that_is_allowed(name: str, tmp_path: Path) -> None:
    config, folder = recipe(tmp_path, *RECIPES[name], "curate.rounds=3")
    first, second, last = (rounds.config_of(config, folder, number) for number in (1, 2, 3))
    for one in (first, second, last):
        assert Config.model_validate(one.model_dump()) == one
    assert not first.retrieve.seeds and not first.balance.images and not first.curate.embedder
    assert first.dedup == config.dedup and first.curate.copy_embedder == config.curate.copy_embedder
    assert second.curate.embedder == str(tmp_path / "mine" / "round-1")
    assert last.curate.embedder == str(tmp_path / "mine" / "round-2")
    assert second.retrieve == config.retrieve and last.balance == config.balance
    assert {first.data.shards, second.data.shards} == {str(tmp_path / "mine" / "shards")}
    assert [one.run.name for one in (first, second, last)] == [
        "mine/round-1", "mine/round-2", "mine",
    ]  # fmt: skip
    # each round is a run of one round, but the last, which is the recipe's
    assert [one.curate.rounds for one in (first, second, last)] == [1, 1, 3]
    assert {one.model.init for one in (first, second, last)} == {""}


def test_an_earlier_round_has_the_sets_that_the_chain_has_packed(tmp_path: Path) -> None:
    more = [*RECIPES["balance"], "curate.rounds=2", "guard.keep=birds/", "model.init=w"]
    more += ["evaluate.queries=test/"]
    config, folder = recipe(tmp_path, *more)
    last = rounds.config_of(config, folder, 2)
    packed = last.model_copy(
        update={
            "guard": last.guard.model_copy(update={"keep": "pack/keep"}),
            "evaluate": last.evaluate.model_copy(update={"queries": "pack/queries"}),
        }
    )
    inside = rounds.Round(config, 1)._context(Context(packed, folder)).config
    assert (inside.guard.keep, inside.evaluate.queries) == ("pack/keep", "pack/queries")


def test_a_comparison_on_training_images_is_said(tmp_path: Path) -> None:
    more = [*RECIPES["balance"], "curate.rounds=2"]
    assert "trained on" in rounds.on_training_images(recipe(tmp_path, *more)[0])
    for named in ("evaluate.queries=test/", "evaluate.reference=other/"):
        assert not rounds.on_training_images(recipe(tmp_path, *more, named)[0])


def test_the_first_round_goes_by_an_embedder_that_is_named(tmp_path: Path) -> None:
    more = ["curate.preset=balanced", "balance.images=10", "curate.embedder=runs/other"]
    config, folder = recipe(tmp_path, *more, "curate.rounds=2", "curate.shards=kept/")
    first, last = (rounds.config_of(config, folder, number) for number in (1, 2))
    assert first.curate.embedder == "runs/other" and first.balance.images == 10
    assert last.curate.embedder == str(tmp_path / "mine" / "round-1")
    assert (first.curate.shards, last.curate.shards) == ("", "kept/")


def test_later_rounds_start_from_the_weights_before_where_asked_to(tmp_path: Path) -> None:
    more = ["curate.preset=balanced", "balance.images=10", "curate.rounds=2", "model.init=w"]
    config, folder = recipe(tmp_path, *more)
    assert [rounds.config_of(config, folder, n).model.init for n in (1, 2)] == ["w", "w"]
    config, folder = recipe(tmp_path, *more, "curate.rounds_init=previous")
    before = str(tmp_path / "mine" / "round-1")
    assert [rounds.config_of(config, folder, n).model.init for n in (1, 2)] == ["w", before]


def test_rounds_of_a_remote_run_are_below_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYDINO_HOME", str(tmp_path))
    more = [*RECIPES["balance"], "curate.rounds=2", "run.folder=s3://bucket/runs?region=x"]
    config, _ = recipe(tmp_path, *more)
    folder = RunFolder.of(config.run.folder, config.run.name)
    first = rounds.folder_of(folder, 1)
    assert first.path == folder.path / "round-1"
    assert str(first.checkpoints) == "s3://bucket/runs/mine/round-1/checkpoints?region=x"
    last = rounds.config_of(config, folder, 2)
    assert last.curate.embedder == "s3://bucket/runs/mine/round-1?region=x"
    assert (
        rounds.config_of(config, folder, 1).data.shards == "s3://bucket/runs/mine/shards?region=x"
    )


def test_rounds_stand_between_pack_and_curate_and_are_compared_after_the_evaluation(
    tmp_path: Path,
) -> None:
    config, _ = recipe(tmp_path, *RECIPES["balance"], "curate.rounds=3")
    names = list(rounds.stages_of(config))
    assert names[:8] == [
        "pack", "round-1", "round-2", "curate", "adapt", "pretrain", "evaluate", "rounds",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["curate.rounds=2"], "curate.preset is empty"),
        (["curate.rounds=2", "curate.preset=dedup"], "each round would keep the same images"),
        (["curate.rounds=0", *RECIPES["balance"]], "curate.rounds: Input should be greater"),
        (["curate.rounds_init=previous", *RECIPES["balance"]], "there is one round"),
    ],
)
def test_a_recipe_whose_rounds_make_no_sense_is_refused(
    more: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        recipe(tmp_path, *more)
    assert len(error.value.what.splitlines()) == 1


def test_curated_shards_are_no_pile(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "_manifest.json").write_text(json.dumps({"source": "curated from piles/whole"}))
    more = ["data.source=", f"data.shards={kept}", "curate.rounds=2"]
    config, folder = recipe(tmp_path, *RECIPES["balance"], *more)
    with pytest.raises(ConfigError, match="holds what a curation kept") as error:
        rounds.check(config, folder)
    assert "data.shards=piles/whole" in error.value.hint


def test_a_stage_alone_is_that_of_the_last_round(tmp_path: Path) -> None:
    config, folder = recipe(tmp_path, *RECIPES["balance"], "curate.rounds=2")
    for stage in ("curate", "pretrain"):
        with pytest.raises(ConfigError, match=f"{stage} alone is that of the last round"):
            rounds.run(config, [stage])
    assert not folder.path.exists()


def test_the_runs_of_a_round_are_below_its_own(tmp_path: Path) -> None:
    settings = TrackSettings(str(tmp_path / "run"), "pipeline", uri="none")
    with driver.open_pipeline(settings, "mine") as tracking:
        tracking.stage("round-1")
        part = tracking.below("round-1")
        part.stage("pretrain", tags={"a": "b"}).headline(3, {"eval/score": 0.5})
        sent = part.worker_settings("pretrain")
        assert (sent.stage, sent.above) == ("round-1/pretrain", "round-1")
        part.end_stage("pretrain")
        tracking.end_stage("round-1")
        tracking.stage("pretrain").headline(3, {"eval/score": 0.6})
        tracking.end_stage("pretrain")
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    opened = {x["run"]: (x["open"]["name"], x["open"].get("parent")) for x in lines if "open" in x}
    assert opened == {
        "pipeline": ("mine", None),
        "round-1": ("round-1", "pipeline"),
        "round-1/pretrain": ("pretrain", "round-1"),
        "pretrain": ("pretrain", "pipeline"),
    }
    shown = {x["run"]: x["to"] for x in lines if "metrics" in x}
    assert shown == {"round-1/pretrain": "round-1", "pretrain": "pipeline"}
    assert {x["run"] for x in lines if "end" in x} == set(opened)


def test_of_a_round_in_a_remote_folder_the_same_files_are_copied_as_of_a_run() -> None:
    for name, belongs in (
        ("plan.yaml", True),
        ("curate/report.html", True),
        ("curate/steps/decisions/0.parquet", False),
        ("checkpoints/step-00000010/meta.json", False),
        ("curated/part-00000.parquet", False),
        ("pretrain/ray/x", False),
        ("pretrain/bad_images.parquet", False),
    ):
        assert _belongs(name) == _belongs(f"round-12/{name}") == belongs, name
    assert _belongs("rounds/card.json")
