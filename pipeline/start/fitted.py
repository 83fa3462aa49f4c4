"""A chosen recipe fitted to a machine: batches to a GPU's memory, the length to hours."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.adapt.recipe import Line, is_set
from pipeline.doctor import fits
from pipeline.plan.plan import Plan
from pipeline.start.choose import Choice
from pipeline.start.folder import Folder
from pipeline.start.machine import GIB, Surroundings
from pipeline.start.memory import fit, planned
from pipeline.train import estimate
from pipeline.train.speed.cost import Cost

HOUR_S = 3600.0
HOURS = {"cpu": 8.0, "cuda": 24.0}  # of training, unless the user says otherwise
# A core decodes and cuts a megapixel of a JPEG in so many seconds: 12 megapixels at half scale take
# 20 ms (configs/small.yaml)
DECODE_S = 0.02 / 12


@dataclass(frozen=True)
class Fitted:
    """A recipe for a machine.

    Attributes:
        choice: with its batches and its length.
        plan: of it; None where the images are not counted yet or an adaptation decides later.
        cost: of the plan.
        seconds: of training by the speed of matrix products here; 0: not known.
        decode_s: of one core for the images that are decoded, all together.
    """

    choice: Choice
    plan: Plan | None = None
    cost: Cost | None = None
    seconds: float = 0.0
    decode_s: float = 0.0


def fitted(choice: Choice, folder: Folder, around: Surroundings) -> Fitted:
    """The recipe for this machine.

    Raises:
        PipelineError: a step of it does not fit into the memory of the GPU.
    """
    if choice.name == "adapt" or not folder.images:
        return Fitted(choice)
    gpu = bool(around.machine.gpus) and choice.config.train.device != "cpu"
    if gpu:
        choice = _for_memory(choice, folder, around)
    recipe = _planned(choice, folder, around)
    hours = choice.config.start.hours or HOURS["cuda" if gpu else "cpu"]
    lasts = _lasts(recipe)
    length = any(_yours(choice, field) for field in ("optim.steps", "optim.passes"))
    if lasts > hours * HOUR_S and not length:
        long = recipe  # the speed is tried once: on a busy machine it is another one each time
        recipe = _planned(
            _shorter(long, hours * HOUR_S / lasts, hours), folder, replace(around, here=False)
        )
        assert long.plan is not None and recipe.plan is not None
        seconds = long.seconds * recipe.plan.steps / long.plan.steps
        recipe = replace(recipe, seconds=seconds)
    return recipe


def unused(recipe: Fitted, around: Surroundings) -> list[str]:
    """A sentence for each field of `start` that this recipe does not follow, with the reason."""
    choice, settings = recipe.choice, recipe.choice.asked.start
    sentences = []
    if settings.hours is not None and (why := _no_hours(recipe, around)):
        sentences.append(f"start.hours={settings.hours:g}{why}")
    if settings.gpu_gb is not None:
        why = ""
        if choice.name == "adapt":
            why = ": an adaptation fits its batch to the GPU that it runs on, when it runs"
        elif recipe.plan is None:
            why = ": a batch is fitted to a number of images, which only packing shows"
        elif _yours(choice, "train.accumulation"):
            why = " for the batch: train.accumulation sets how many images are computed at once"
        if why:
            sentences.append(f"start.gpu_gb={settings.gpu_gb:g}{why}")
    return sentences


def _no_hours(recipe: Fitted, around: Surroundings) -> str:
    """Why `start.hours` is not followed; "" where it is."""
    choice = recipe.choice
    lengths = [field for field in ("optim.steps", "optim.passes") if _yours(choice, field)]
    if lengths:
        return f": {lengths[0]} sets the length"
    if choice.name == "adapt":
        return ": an adaptation takes its length from weights and images; optim.steps=… sets it"
    if recipe.plan is None:
        return ": only packing shows how many images there are; optim.passes=… sets the length"
    if not recipe.seconds:
        place = f"how fast {around.place} trains is not known"
        return f" for the training: {place}; optim.passes=… sets the length"
    return ""


def _planned(choice: Choice, folder: Folder, around: Surroundings) -> Fitted:
    plan, built = planned(choice.config, around.machine, folder.images)
    cost = estimate.estimated_cost(plan, built)
    seconds = fits.seconds_of(plan, cost) if around.here else 0.0
    megapixels = sum(folder.megapixels) / max(1, len(folder.megapixels))
    seen = plan.steps * plan.config.optim.global_batch_size
    return Fitted(choice, plan, cost, seconds, seen * megapixels * DECODE_S)


def _lasts(recipe: Fitted) -> float:
    """Seconds: of the training, or of the decoding on all CPUs where that is longer."""
    plan = recipe.plan
    assert plan is not None
    return max(recipe.seconds, recipe.decode_s / max(1, plan.decode_tasks))


def _shorter(recipe: Fitted, part: float, hours: float) -> Choice:
    """The choice with fewer passes, so that it takes a part of the time."""
    plan, choice = recipe.plan, recipe.choice
    assert plan is not None
    passes = part * plan.steps / plan.steps_per_pass
    value = float(f"{passes:.2g}") if passes < 10 else int(passes)
    whole = plan.steps / plan.steps_per_pass
    what = "training" if recipe.seconds else "decoding"
    why = f"of {whole:.0f}, so that {what} takes about {hours:g} hours (start.hours=… changes that)"
    line = Line("optim.passes", value, why, "images")
    return _changed(choice, line)


def _for_memory(choice: Choice, folder: Folder, around: Surroundings) -> Choice:
    """The choice with as many images at once as fit on the GPU."""
    if _yours(choice, "train.accumulation"):
        return choice
    one = _changed(choice, Line("train.accumulation", 1, "", "images"))
    way = fit(one.config, around.machine, folder.images, around.gpu_bytes)
    size = f"{way.total / GIB:.1f} of {around.gpu_bytes / GIB:.0f} GiB"
    why = f"{way.micro_batch} images at once take {size}; computed, not measured"
    lines = [Line("train.accumulation", way.accumulation, why, "images")]
    if way.checkpointing:
        why = "activations are computed again: less memory, a quarter more time"
        lines.append(Line("train.activation_checkpointing", True, why, "images"))
    return _changed(choice, *lines)


def _yours(choice: Choice, field: str) -> bool:
    return is_set(choice.asked, field)


def _changed(choice: Choice, *lines: Line) -> Choice:
    """The choice with other values; the config is made of the user's fields and all lines."""
    recipe = choice.recipe
    config = choice.config
    for line in lines:
        recipe = recipe.with_line(line)
        section, _, name = line.field.partition(".")
        part = getattr(config, section).model_copy(update={name: line.value})
        config = config.model_copy(update={section: part})
    return replace(choice, recipe=recipe, config=config)
