"""What the adapt stage knows of a run that has begun: its weights and its recipe stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.adapt.derive import derive
from pipeline.card.files import write_card
from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.context import Context
from pipeline.errors import TrainError
from pipeline.model.vit import BackboneSpec
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve
from pipeline.stages import adapt
from pipeline.stages.checks import micro_batches
from pipeline.storage.run_folder import RunFolder
from pipeline.train import build, estimate
from pipeline.train.checkpoint import state
from tests.card.cards import card_of, contender

STAGES = ["pack", "curate", "adapt", "pretrain", "evaluate", "export"]
SPEC = BackboneSpec(image_size=28, patch_size=14, width=64, depth=5, heads=1)


def asked(tmp_path: Path, weights: str, *fields: str) -> Config:
    place = tmp_path / weights
    if not place.exists():
        torch.save(SPEC.build().state_dict(), place)
    return load([f"model.init={place}", "adapt.enabled=true", "run.name=a", *fields])


def begin(tmp_path: Path, config: Config) -> RunFolder:
    """A run that has trained some steps with the recipe for 600 images."""
    folder = RunFolder.of(str(tmp_path), "a")
    facts, recipe = adapt.recipe_for(config, 600, False, folder)
    assert recipe == derive(config, facts, 600, False)
    plan = resolve(
        recipe.applied(config), SetFacts(600, "d"), Machine(cpus=2, gpus=0, bfloat16=False)
    )
    state.save(folder.path / "checkpoints", 5, {}, {"plan": plan.model_dump(mode="json")})
    folder.mark_done("adapt", "key", {"recipe": recipe.to_json()})
    return folder


def test_other_weights_are_refused_before_anything_is_packed(tmp_path: Path) -> None:
    first = asked(tmp_path, "first.pth")
    folder = begin(tmp_path, first)
    config, _ = adapt.begun(first, folder, STAGES)
    assert config.model.width == 64
    with pytest.raises(TrainError, match=r"run a began with .*first\.pth, and .*second\.pth"):
        adapt.begun(asked(tmp_path, "second.pth"), folder, STAGES)


def test_models_that_were_named_later_are_no_before_and_after(tmp_path: Path) -> None:
    """Whoever evaluates another model in the folder of an adapted run compares nothing with it."""
    context = Context(asked(tmp_path, "first.pth"), RunFolder.of(str(tmp_path), "a"))
    write_card(card_of(contender("model", 0.5)), context.folder.path / "adapt")
    after = card_of(contender("model", 0.6), contender("init", 0.5))
    write_card(after, context.folder.path / "evaluate")
    own = adapt.before_and_after(context, {"adapt": {"text": "x"}, "evaluate": {"step": 20}})
    assert own is not None and own.rows and own.one_card
    named = {"adapt": {"text": "x"}, "evaluate": {"text": "another model"}}
    assert adapt.before_and_after(context, named) is None


def test_a_run_that_goes_on_keeps_what_was_derived(tmp_path: Path) -> None:
    first = asked(tmp_path, "first.pth", "optim.lr=0.5")
    folder = begin(tmp_path, first)
    _, again = adapt.recipe_for(first, 10_000, True, folder)  # another machine, more images
    assert again.applied(first) == derive(first, adapt.facts_of(first), 600, False).applied(first)
    without = asked(tmp_path, "first.pth")  # the rate is the user's no more
    lines = adapt.recipe_for(without, 600, False, folder)[1].lines
    assert [line.value for line in lines if line.field == "optim.lr"] == [2e-4]
    mine = asked(tmp_path, "first.pth", "optim.lr=0.5", "train.eval_every=3")
    assert adapt.recipe_for(mine, 600, False, folder)[1].applied(mine).train.eval_every == 3


def test_micro_batches_are_cut_by_the_memory_of_what_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few images tune the last blocks alone, which takes less than the whole network."""
    config = asked(tmp_path, "first.pth", "train.precision=float32")
    recipe = derive(config, adapt.facts_of(config), 600, False)
    assert recipe.value("train.tune") == "last_blocks=4"
    applied = recipe.applied(config)
    plan = resolve(applied, SetFacts(600, "d"), Machine(cpus=2, gpus=0, bfloat16=False))
    whole, trained = (
        estimate.estimated_cost(plan, built).memory_bytes
        for built in (build.pair(applied), build.for_estimate(plan))
    )
    assert trained < whole
    monkeypatch.setattr(micro_batches, "_room", lambda plan, gpu_bytes: (trained + whole) / 2)
    assert micro_batches.lighter(config, plan) is None
    monkeypatch.setattr(micro_batches, "_room", lambda plan, gpu_bytes: 0.98 * trained)
    line = micro_batches.lighter(config, plan)
    assert line is not None and line.field == "train.accumulation" and line.value > 1
    assert "images at once: about" in line.reason and "GiB that a worker may take" in line.reason
    monkeypatch.setattr(
        micro_batches, "_room", lambda plan, gpu_bytes: 2.0**20
    )  # what no step fits into
    line = micro_batches.lighter(config, plan)
    assert line is not None and line.value == plan.micro_batch // 2
    assert "2 images at once, the fewest: about" in line.reason


def test_a_later_job_need_not_name_the_weights(tmp_path: Path) -> None:
    first = asked(tmp_path, "first.pth")
    folder = begin(tmp_path, first)
    later = load(["adapt.enabled=true", "run.name=a"])
    config, _ = adapt.begun(later, folder, ["export"])
    assert config.model.init == first.model.init and config.model.width == 64
    assert config == adapt.begun(first, folder, ["export"])[0]
