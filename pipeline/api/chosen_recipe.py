"""The recipe of `train` where none is named: the one that `start` would write, kept with the run.

It is chosen once: its length is fitted to the speed of the machine, which is another one each time,
and the same call again must go on with the recipe that the run began with.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.uri import parent, public

log = logging.getLogger("pipeline")
NAME = "recipe.yaml"  # in the run folder
ENOUGH = (  # who sets one of these has a training in mind
    "model.init",
    "model.encoder",
    "model.size",
    "model.width",
    "model.depth",
    "optim.passes",
    "optim.steps",
)


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
    lines = [*folder_lines(folder), ("machine", around.line())]
    check_scored(choice.config)  # or a later call without a wrong field would meet it again
    write(recipe, text_of(choice, [f"{name}: {text}" for name, text in lines]))
    log.info(
        "%-11s %s (%s): %s; recipe=FILE.yaml takes another one",
        "recipe",
        choice.name,
        choice.why,
        recipe,
    )
    return recipe


def has_begun(out: str, name: str) -> bool:
    """Whether a run is there already, with a recipe that no call has chosen.

    Args:
        out: the folder of the run folder, as `run.folder`.
        name: of the run.
    """
    from pipeline.storage.places import exists, resolve_uri
    from pipeline.storage.run_folder import RunFolder

    return exists(*resolve_uri(str(RunFolder.of(out, name).at("config.yaml"))))


def source_of(recipe: Path, named: str) -> str:
    """What is trained on: what the recipe was chosen for, or the part of it that it chose.

    Args:
        recipe: that was chosen.
        named: `data.source` of this call, in any spelling.

    Raises:
        ConfigError: the recipe is none, or was chosen for other images.
    """
    from pipeline.config.load import load
    from pipeline.errors import ConfigError
    from pipeline.storage.places import absolute_uri

    chosen = load([str(recipe)]).data.source
    place, asked = absolute_uri(chosen), absolute_uri(named)
    if not chosen:
        return named
    if place.rstrip("/") == asked.rstrip("/"):
        return chosen
    if str(parent(place)[0]) == asked.rstrip("/"):
        log.info("%-11s %s, as the recipe says", "images", public(chosen))
        return chosen
    raise ConfigError(
        f"the run has a recipe that was chosen for {public(chosen)}, and source={public(named)}",
        "take another out=…, or name a recipe: recipe=FILE.yaml",
    )
