"""`jobs/start.py`: looks at images and machine, writes the recipe that fits, says what to run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.context import result_line, size_of
from pipeline.doctor import fits
from pipeline.doctor.dry_run import dry_run
from pipeline.errors import ConfigError
from pipeline.heartbeat import now
from pipeline.stages.chain import ORDER
from pipeline.stages.checks.start import check_scored
from pipeline.stages.console.closing import typed
from pipeline.start import folder as images
from pipeline.start import machine, weights
from pipeline.start.choose import choose
from pipeline.start.fitted import Fitted, fitted, unused
from pipeline.start.folder import Folder
from pipeline.start.machine import Surroundings
from pipeline.start.written import check, place_of, text_of, write
from pipeline.storage.once import looked_up_once
from pipeline.train.speed.bottleneck import count

log = logging.getLogger("pipeline.start")
NAMED = 3  # names of files or classes in a line
LARGE = 4.0  # megapixels, from which decoding is worth a word


@dataclass(frozen=True)
class Started:
    """What `start` has written.

    Attributes:
        recipe: the file; not there after a dry run.
        source: what is trained on: `train/` of a folder that has one.
        choice: adapt, small or vits14.
        why: in a sentence.
        reasons: of each value that was chosen, by field.
        seconds: of training on this machine; 0 where it is not known.
    """

    recipe: Path
    source: str
    choice: str
    why: str
    reasons: dict[str, str]
    seconds: float


def start(config: Config, dry: bool = False) -> Started:
    """Looks, chooses, writes and says what to run.

    Args:
        config: `data.source`, maybe `model.init`, `start.…` and any field of the recipe to be.
        dry: writes nothing, and does the dry run of the recipe.

    Raises:
        PipelineError: there are no images, or too few; the file may not be written; the recipe
            does not fit the machine.
    """
    if not config.data.source:
        raise ConfigError("no images", "name them: python jobs/start.py photos/")
    with looked_up_once():
        now("listing the images")
        folder = images.look(config)
        lines = folder_lines(folder)
        for name, text in lines:
            result_line(name, text)
        now("looking at the machine")
        around = machine.look(config)
        result_line("machine", around.line())
        if not config.model.init:
            _say_weights(config)
        now("planning")
        recipe = fitted(choose(config, folder, around), folder, around)
        choice = recipe.choice
        check_scored(choice.config)
        result_line("recipe", f"{choice.name}: {choice.why}")
        for sentence in (sentences := unused(recipe, around)):
            result_line("not used", sentence)
        if recipe.plan is not None:
            if not dry:
                _say_time(recipe, around)
                _say_memory(recipe, around)
            _say_decoding(recipe, folder)
        path = place_of(config)
        if dry:
            check(path)
            result_line("would write", str(path))
            run = choice.config.run.name or path.stem
            named = choice.config.run.model_copy(update={"name": run})
            other = around.machine if around.machine.elsewhere else None
            dry_run(choice.config.model_copy(update={"run": named}), ORDER, other)
        else:
            lines.append(("machine", around.line()))
            lines += [("not used", sentence) for sentence in sentences]
            facts = [f"{name}: {text}" for name, text in lines]
            said = write(path, text_of(choice, facts))
            load([str(path)])  # what is written can be read
            result_line("wrote", f"{path}, each value with its reason" + f" ({said})" * bool(said))
            result_line("dry run", typed("run", str(path), "--dry-run"))
            result_line("run", typed("run", str(path)))
    reasons = {line.field: line.reason for line in choice.recipe.lines}
    return Started(path, folder.source, choice.name, choice.why, reasons, recipe.seconds)


def folder_lines(folder: Folder) -> list[tuple[str, str]]:
    """What is known of the images, as (first word, text)."""
    number = f"{folder.images:,} images" if folder.images else folder.hidden
    text = f"{folder.source}: {number}, {size_of(folder.size)}"
    lines = [("images", text)]
    if folder.classes:
        names = ", ".join(folder.classes[:NAMED])
        more = ", …" * (len(folder.classes) > NAMED)
        why = f"; {folder.classes_why}" * bool(folder.classes_why)
        lines.append(("labels", f"{len(folder.classes):,} classes: {names}{more}{why}"))
    elif folder.labels_elsewhere:
        lines.append(("labels", "in columns or archives, if there are any"))
    else:
        why = folder.no_classes or "no folders of classes: the evaluation has scores without labels"
        lines.append(("labels", f"none; {why}"))
    if folder.queries:
        text = "scored, never trained on"
        if folder.overlap:
            text = f"scored, and trained on as far as it overlaps with {folder.source}"
        lines.append(("held out", f"{folder.queries}: {text}"))
    elif folder.together:
        lines.append(("held out", folder.together))
    lines += [("left alone", f"{place}: {text}") for place, text in folder.beside]
    if folder.sides:
        low, high = min(folder.sides), max(folder.sides)
        formats = ", ".join(f"{n} {name}" for name, n in folder.formats.items())
        lines.append(
            (
                "sizes",
                f"shorter side {folder.side} pixels ({low} to {high}) in a sample of "
                f"{len(folder.sides)}: {formats}",
            )
        )
    if folder.bad:
        shown = ", ".join(folder.bad[:NAMED])
        lines.append(("bad", f"{len(folder.bad)} of the sample: {shown}"))
    if folder.unnamed:
        number = count(folder.unnamed, "file")
        text = f"{number} without an image's ending, such as {folder.example}: packing opens them,"
        lines.append(("opened", f"{text} and takes those that are images; they are not counted"))
    if folder.others:
        shown = ", ".join(name for name, _ in folder.others[:NAMED])
        more = ", …" * (len(folder.others) > NAMED)
        lines.append(("left alone", f"{count(len(folder.others), 'other file')}: {shown}{more}"))
    return lines


def _say_weights(config: Config) -> None:
    there = weights.at_hand()
    if not there:
        result_line("weights", "none named and none in the caches of torch.hub or Hugging Face")
        return
    result_line("weights", "none named; these are here, and give more than random ones:")
    for place in there:
        result_line("", typed("start", config.data.source, str(place)))


def _say_time(recipe: Fitted, around: Surroundings) -> None:
    plan = recipe.plan
    assert plan is not None
    seen = plan.steps * plan.config.optim.global_batch_size
    each = seen / max(1, plan.images)
    result_line("length", f"{plan.steps:,} steps, {seen:,} images seen, each {each:.3g} times")
    if recipe.seconds:
        result_line(
            "time",
            f"about {fits.in_words(recipe.seconds)} of training on this machine, a guess from its "
            "speed of matrix products; the run says better after some steps",
        )
    else:
        where = "it is not here" if not around.here else "the speed of its GPU is not known"
        result_line("time", f"not known on {around.place}: {where}")


def _say_memory(recipe: Fitted, around: Surroundings) -> None:
    """Warns where what the user has set does not fit."""
    assert recipe.plan is not None and recipe.cost is not None
    fits.say_memory(recipe.plan, recipe.cost, around.machine)


def _say_decoding(recipe: Fitted, folder: Folder) -> None:
    """Warns of photos that are decoded at their full size again and again."""
    plan = recipe.plan
    assert plan is not None
    average = sum(folder.megapixels) / max(1, len(folder.megapixels))
    if average > LARGE:
        each = recipe.decode_s / max(1, plan.decode_tasks)
        log.warning(
            "photos of %.0f megapixels: decoding them again and again takes about %s on %s; shrink "
            "them to 512 pixels first, if that is longer than the training",
            average,
            fits.in_words(each),
            count(plan.decode_tasks, "decode task"),
        )
