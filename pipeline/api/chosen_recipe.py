"""The recipe of `train` where none is named: the one that `start` would write, kept with the run.

It is chosen once: its length is fitted to the speed of the machine, which is another one each time,
and the same call again must go on with the recipe that the run began with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.uri import is_uri, public

log = logging.getLogger("pipeline")
NAME = "recipe.yaml"  # in the run folder
ENOUGH = ("model.init", "optim.passes", "optim.steps")  # who sets one has a training in mind
NETWORK = ("model.encoder", "model.size", "model.width", "model.depth")  # that a recipe chooses


def kept_recipe(out: str, name: str) -> Path | None:
    """The recipe that an earlier call chose for a run; None where there is none.

    Args:
        out: the folder of the run folder, as `run.folder`.
        name: of the run.

    Raises:
        PipelineError: the name is none, or the storage failed.
    """
    from pipeline.storage.places import resolve_uri
    from pipeline.storage.run_folder import RunFolder, atomic
    from pipeline.storage.transfer import read_bytes

    folder = RunFolder.of(out, name)
    recipe = folder.path / NAME
    if folder.uri:  # the working copy of another machine has it, or one that was deleted here
        try:
            content = read_bytes(*resolve_uri(str(folder.at(NAME))))
        except FileNotFoundError:
            content = b""
        if content:
            with atomic(recipe) as temporary:
                temporary.write_bytes(content)
    if not recipe.is_file():
        return None
    log.info("%-11s %s, which was chosen when the run began", "recipe", recipe)
    return recipe


def choose_recipe(out: str, name: str, overrides: Sequence[str]) -> Path:
    """Looks at images and machine, and writes the recipe that fits into the run folder.

    Args:
        out: the folder of the run folder, as `run.folder`.
        name: of the run.
        overrides: `data.source=…` and the other fields that the user sets.

    Raises:
        PipelineError: there are no images, or too few for random weights; a field is wrong; the
            run folder cannot be written, or has a recipe that somebody else wrote.
    """
    from pipeline.config.load import load
    from pipeline.stages.checks.start import check_scored
    from pipeline.start import folder as images
    from pipeline.start import machine
    from pipeline.start.choose import choose
    from pipeline.start.fitted import fitted
    from pipeline.start.start import folder_lines
    from pipeline.start.written import text_of, write
    from pipeline.storage.once import looked_up_once
    from pipeline.storage.run_folder import RunFolder

    recipe = RunFolder.of(out, name).path / NAME
    config = load(overrides)
    with looked_up_once():
        folder, around = images.look(config), machine.look(config)
        choice = fitted(choose(config, folder, around), folder, around).choice
        check_scored(choice.config)  # or a later call without a wrong field would meet it again
    lines = [*folder_lines(folder), ("machine", around.line())]
    write(recipe, text_of(choice, [f"{name}: {text}" for name, text in lines]))
    log.info(
        "%-11s %s (%s): %s; recipe=FILE.yaml takes another one",
        "recipe",
        choice.name,
        choice.why,
        recipe,
    )
    return recipe


def check_open(out: str, name: str, settings: Mapping[str, Any]) -> None:
    """Refuses to choose a recipe where that would not be the one that is meant.

    Args:
        out: the folder of the run folder, as `run.folder`.
        name: of the run.
        settings: of the call, by field.

    Raises:
        ConfigError: the run has begun with another one, or settings name a network.
    """
    from pipeline.errors import ConfigError
    from pipeline.stages.evaluation import has_checkpoint
    from pipeline.storage.run_folder import RunFolder

    if has_checkpoint(RunFolder.of(out, name)):
        raise ConfigError(
            f"run {name} has begun with a recipe or settings of its own, and this call names none",
            "give the same recipe=… or settings again",
        )
    if field := next((field for field in NETWORK if settings.get(field)), ""):
        raise ConfigError(
            f"settings name {field}, and there is no recipe: a chosen one has its own network",
            "name a recipe, such as recipe='configs/vits14.yaml', or set optim.passes and "
            "optim.global_batch_size too",
        )


def source_of(recipe: Path, named: str) -> str:
    """What is trained on: what the recipe was chosen for, or the part of it that it chose.

    Args:
        recipe: that was chosen.
        named: `data.source` of this call. It may be spelt otherwise than then.

    Raises:
        ConfigError: the recipe is none.
    """
    from pipeline.config.load import load
    from pipeline.stages.checks.parts import TRAINING

    chosen = load([str(recipe)]).data.source
    place, asked = _comparable(chosen), _comparable(named)
    above, last = place.rpartition("/")[::2]
    if place == asked:
        return chosen
    if above == asked and last.lower() in TRAINING:
        log.info("%-11s %s, as the recipe says", "images", public(chosen))
        return chosen
    if chosen:
        log.warning(
            "%s was chosen for %s, and this call names %s; to choose anew, take another out=…",
            recipe,
            public(chosen),
            public(named),
        )
    return named


def _comparable(place: str) -> str:
    """One name for a place, without what may be a secret."""
    return public(place).rstrip("/") if is_uri(place) else str(Path(place).expanduser().resolve())
