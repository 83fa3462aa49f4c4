"""The adapt stage: reads the weights, derives the recipe, and scores the weights as they are.

`begun` and `derived` are what other jobs of the same run need of it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.adapt.compare import Comparison, before_line, compared, numbers_before
from pipeline.adapt.derive import derive, facts_alone
from pipeline.adapt.facts import facts_of
from pipeline.adapt.networks import Facts
from pipeline.adapt.recipe import Recipe, is_set, set_values, written
from pipeline.card.card import Card
from pipeline.card.files import CARD, read_card, write_card
from pipeline.card.inputs.networks import Network
from pipeline.card.run import evaluate
from pipeline.card.scoring.request import Request
from pipeline.card.scoring.scores import Scoring
from pipeline.card.shown.page import write_page
from pipeline.config.config import Config
from pipeline.context import Context, result_line, with_packed_sets
from pipeline.embed.beginnings import load_planned
from pipeline.embed.embedders import EmbedderSpec, embedder_of
from pipeline.errors import ConfigError, PipelineError, TrainError
from pipeline.images.value_range import FULL
from pipeline.plan.plan import Plan
from pipeline.plan.resume import plan_of
from pipeline.stages import evaluate as evaluation_stage
from pipeline.stages import pretrain
from pipeline.stages.checks.micro_batches import lighter
from pipeline.stages.checks.weights import check_weights
from pipeline.stages.evaluation import dense_of, groups_of, sampled, sets_of
from pipeline.storage.run_folder import RunFolder, atomic, fingerprint
from pipeline.train.checkpoint import state
from pipeline.uri import public

log = logging.getLogger("pipeline.adapt")
FORM = 2  # of what the stage stores; one of another form is made once more
RECIPE, PAGE = "recipe.yaml", "card.html"


def begun(config: Config, folder: RunFolder, stages: Sequence[str]) -> tuple[Config, Config | None]:
    """The recipe with what is known before the images are, and the recipe as it was asked for.

    In a job that derives it, these are the facts of the weights; in others of the same run, all
    that was derived.

    Returns:
        (the config, the one that the user wrote; None where nothing is adapted).

    Raises:
        PipelineError: there are no weights, or others than the run began with, or nothing was
            derived yet that this job needs.
    """
    if not config.adapt.enabled:
        return config, None
    if config.curate.rounds > 1:
        raise ConfigError(
            f"adapt.enabled=true and curate.rounds={config.curate.rounds}: an adaptation has one "
            "round",
            "adapt first, then curate with the adapted weights: curate.embedder=runs/<name>",
        )
    if "adapt" not in stages:
        rows = folder.last("adapt").get("recipe")
        if rows:
            config = _with_weights(config, folder)
            return Recipe.from_json(rows).applied(config), config
        if "pretrain" not in stages:
            return config, None
        raise ConfigError(
            "adapt.enabled=true, and nothing is derived yet in this run",
            "run jobs/adapt.py with the same arguments, which packs, derives and trains",
        )
    facts = facts_of(config)
    _check_began_with(facts.init, folder)
    model = config.model.model_copy(update={"init": facts.init})
    asked = config.model_copy(update={"model": model})
    recipe = facts_alone(asked, facts)
    rows = folder.last("adapt").get("recipe")
    if rows and state.latest(folder.checkpoints) is not None:
        recipe = recipe.within(Recipe.from_json(rows))  # a later version may read more off weights
    return recipe.applied(asked), asked


def _with_weights(config: Config, folder: RunFolder) -> Config:
    """The recipe with the weights that the run began with, where a later job names none."""
    saved = None if config.model.init else state.latest(folder.checkpoints)
    if saved is None:
        return config
    init = plan_of(saved.meta, saved.path).config.model.init
    return config.model_copy(update={"model": config.model.model_copy(update={"init": init})})


def _check_began_with(init: str, folder: RunFolder) -> None:
    """Refuses other weights than those of a run's checkpoint before its images are packed anew."""
    saved = state.latest(folder.checkpoints)
    began = plan_of(saved.meta, saved.path).config.model.init if saved else init
    if began != init:
        raise TrainError(
            f"run {folder.path.name} began with {public(began) or 'random weights'}, and "
            f"{public(init)} is to be adapted",
            "take another run.name=…, or name the weights that the run began with",
        )


def derived(context: Context, result: dict[str, Any]) -> Config:
    """The config with all that a finished stage has derived."""
    assert context.asked is not None
    recipe = Recipe.from_json(result["recipe"])
    return with_packed_sets(recipe.applied(context.asked), context.folder)


def recipe_for(asked: Config, images: int, gpu: bool, folder: RunFolder) -> tuple[Facts, Recipe]:
    """The facts and the recipe; that of before where a training has begun with it.

    Args:
        asked: the recipe as the user wrote it.
        images: that are trained on.
        gpu: training has GPUs.
        folder: of the run.
    """
    facts = facts_of(asked)
    recipe = derive(asked, facts, images, gpu)
    rows = folder.last("adapt").get("recipe")
    if not rows or state.latest(folder.checkpoints) is None:
        return facts, recipe
    earlier = Recipe.from_json(rows)
    kept = [
        line for line in earlier.lines if line.whose != "yours" and not is_set(asked, line.field)
    ]
    names = {line.field for line in kept}
    yours = {line.field for line in (*earlier.lines, *recipe.lines) if line.whose == "yours"}
    new = [line for line in recipe.lines if line.field in yours - names]
    return facts, Recipe((*kept, *new))


def key(context: Context) -> str:
    """Changes with the weights, the images, and all that the recipe and the card depend on."""
    asked, shards = context.asked, context.shards()
    assert asked is not None
    values = set_values(asked)
    for section in ("run", "track", "resources", "export", "embed", "search", "look", "serve"):
        values.pop(section, None)
    network = Network("model", "", "", _spec(asked, context.config))
    sets = sets_of(context.config, context.folder, [network])
    digests = {what: one.digest for what, one in sets.each.items()} if sets else {}
    parts = [FORM, network.spec.digest, shards.digest, shards.rows, values, digests]
    return fingerprint([*parts, context.config.run.seed])


def intact(context: Context) -> bool:
    """Whether what the stage wrote is still there."""
    folder = context.folder.path / "adapt"
    names = [RECIPE, *([CARD, PAGE] if context.config.adapt.card else [])]
    return all((folder / name).is_file() for name in names)


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Derives, writes the recipe, and makes the card of the weights as they are."""
    asked, folder = context.asked, context.folder
    assert asked is not None
    shards = context.shards()
    gpu = _has_gpus(asked)
    facts, recipe = recipe_for(asked, shards.rows, gpu, folder)
    config = with_packed_sets(recipe.applied(asked), folder)
    pretrain.key(replace(context, config=config))  # refuses other weights than a run began with
    plan = pretrain.plan(replace(context, config=config))
    if line := lighter(asked, plan):
        recipe = recipe.with_line(line)
        config = with_packed_sets(recipe.applied(asked), folder)
        plan = pretrain.plan(replace(context, config=config))
    say(facts, recipe, shards.rows)
    for remark in check_weights(config, folder, shards):
        log.warning("init: %s", remark)
    path = folder.path / "adapt" / RECIPE
    with atomic(path) as temporary:
        temporary.write_text(written(recipe, config))
    log.info("recipe      %s", public(folder.at("adapt", RECIPE)))
    tracker.artifact(path, "adapt")
    tracker.params(
        {
            "weights": public(facts.init),
            "images": shards.rows,
            "steps": plan.steps,
            "batch": config.optim.global_batch_size,
            "lr": f"{plan.lr:.3g}",
            "parameters": f"{facts.parameters / 1e6:.1f} M",
        }
    )
    tracker.table("recipe", recipe.columns())
    context.tracking.tracker.tags({"adapted.from": public(facts.init)})
    text = f"{plan.steps:,} steps of {config.optim.global_batch_size} from {facts.what}"
    result: dict[str, Any] = {"text": text, "recipe": recipe.to_json()}
    if config.adapt.card:
        card = _card(replace(context, config=config), plan, asked)
        said = before_line(card)
        result_line("before", said)
        tracker.metrics(0, dict(numbers_before(card)))
        tracker.artifact(folder.path / "adapt" / PAGE, "adapt")
        result |= {"page": f"adapt/{PAGE}", "text": f"{text}; before: {said}"}
    tracker.note(str(result["text"]))
    return result


def say(facts: Facts, recipe: Recipe, images: int) -> None:
    """Prints what was derived, a line each."""
    size = f"{facts.parameters / 1e6:.1f} M parameters"
    result_line("weights", f"{public(facts.init)}: {facts.what}, {size}")
    result_line("adapt", f"a recipe for {images:,} images; a field that you set stays as it is")
    for line in recipe.said():
        log.info("%s", line)


def _has_gpus(config: Config) -> bool:
    if config.train.device == "cpu":
        return False
    import ray

    return bool(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0)


# ---- Before and after.


def before_and_after(context: Context, results: Mapping[str, Any]) -> Comparison | None:
    """The two cards of this run side by side; None where nothing was adapted, or the last card is
    not of the adapted weights but of models that were named.

    Args:
        context: of the job.
        results: of stages by name, whose cards count.
    """
    own = "step" in (results.get("evaluate") or {})
    if not (results.get("adapt") and own):
        return None
    place = context.folder.path
    before = None
    try:
        if (place / "adapt" / CARD).is_file():
            before = read_card(place / "adapt")
        after = read_card(place / "evaluate")
    except PipelineError as error:
        log.warning("before and after cannot be told: %s", error.what)
        return None
    return compared(before, after)


def _spec(asked: Config, config: Config, plan: Plan | None = None) -> EmbedderSpec:
    """The weights as they are, for the images as the run sees them."""
    augment, settings = config.augment, config.evaluate
    spec = embedder_of(
        asked.model.init, mean=augment.mean, std=augment.std, folder=config.run.folder
    )
    spec = replace(
        spec,
        name=public(asked.model.init),
        image_size=settings.image_size or augment.global_size,
        mean=augment.mean,
        std=augment.std,
        batch_size=settings.batch_size,
    )
    if plan is None:
        return spec
    return replace(
        spec,
        load=_loading(plan),
        half=plan.precision == "bfloat16",
        value_range=plan.value_range or FULL,
    )


def _loading(plan: Plan, untrained: bool = False) -> Any:
    from functools import partial

    return partial(load_planned, plan, untrained)


def _card(context: Context, plan: Plan, asked: Config) -> Card:
    """The card of the weights before training, as `adapt/card.html` and `card.json`."""
    config, folder = context.config, context.folder
    spec = _spec(asked, config, plan)
    name = public(asked.model.init)
    fresh = replace(
        spec, name=f"{name} (untrained)", digest=f"{spec.digest} untrained",
        load=_loading(plan, True),
    )  # fmt: skip
    networks = (
        Network("model", name, "", spec, images=0),
        Network("untrained", f"{name} untrained", name, fresh, 0),
    )
    sets = sets_of(config, folder, networks)
    settings = config.evaluate
    request = Request(
        networks,
        sets,
        folder.at("adapt"),
        groups_of(config),
        Scoring(settings.k, settings.temperature, config.run.seed),
        dense_of(config),
        settings.decide_by,
        title=f"{name}, before it is adapted",
        max_pixels=config.data.max_image_pixels,
        gpu=plan.device == "cuda",
        remarks=sampled(sets),
    )
    card = evaluate(request)
    place = folder.path / "adapt"
    write_card(card, place)
    write_page(card, place / PAGE, evaluation_stage.image_of(request), name)
    result_line("card", public(folder.at("adapt", PAGE)))
    return card
