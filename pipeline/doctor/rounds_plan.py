"""What the rounds of a recipe would do, for `--dry-run`: their choice of images, and their time."""

from __future__ import annotations

import logging

from pipeline import rounds
from pipeline.config.config import Config
from pipeline.context import result_line
from pipeline.doctor import fits
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.stages.pretrain import starting_pair
from pipeline.storage.run_folder import RunFolder
from pipeline.train import estimate

log = logging.getLogger("pipeline")


def say_rounds(config: Config, folder: RunFolder, machine: Machine, facts: SetFacts) -> None:
    """Two lines for each round, and one on all of them.

    Args:
        config: the recipe, with paths in full.
        folder: of the run.
        machine: that it would run on.
        facts: of the images before any is left out.
    """
    count, seconds = config.curate.rounds, 0.0
    for number in range(1, count + 1):
        one, place = rounds.config_of(config, folder, number), folder
        result_line(f"round {number}", f"of {count}: {chosen(config, number)}")
        if number < count:
            place = rounds.folder_of(folder, number)
        if not facts.images:
            continue
        # the weights of the round before are of the same network, and not there yet
        plan = resolve(one.model_copy(update={"model": config.model}), facts, machine=machine)
        cost = estimate.estimated_cost(plan, starting_pair(plan, place))
        took = 0.0 if machine.elsewhere else fits.seconds_of(plan, cost)
        result_line("", f"trains {_steps(plan)}{_about(took)}, from {_start(config, number)}")
        seconds += took
    if seconds:
        result_line("rounds", f"{count} trainings, about {fits.in_words(seconds)} together")


def chosen(config: Config, number: int) -> str:
    """What a round chooses images by."""
    if number > 1:
        return f"images chosen by the network of round {number - 1}"
    if config.curate.embedder:
        return "images chosen by curate.embedder"
    return "copies and junk go (there is no network yet that could choose)"


def _start(config: Config, number: int) -> str:
    if number > 1 and config.curate.rounds_init == "previous":
        return f"the weights of round {number - 1}"
    return "model.init" if config.model.init else "random weights"


def _steps(plan: Plan) -> str:
    return f"{plan.steps:,} steps of {plan.config.optim.global_batch_size} images"


def _about(seconds: float) -> str:
    return f", about {fits.in_words(seconds)}" if seconds else ""
