"""The evaluate stage: a card with the scores of models, of what they began as, and of plain images.

Alone (`jobs/evaluate.py`) it scores whatever is named, and folders of images are packed first. In a
whole chain it scores the run's own teacher. What is scored and on what stands in `evaluation.py`.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.card.card import VERSION, Card, Contender
from pipeline.card.examples.gathered import examples_of
from pipeline.card.examples.kept import write_examples
from pipeline.card.files import CARD, read_card, write_card
from pipeline.card.inputs.tables import images_of
from pipeline.card.run import evaluate, facts_of
from pipeline.card.scoring.request import Request
from pipeline.card.shown.compare import PAGE as COMPARED
from pipeline.card.shown.compare import compare_cards
from pipeline.card.shown.mistakes import ImageOf, pictures_of
from pipeline.card.shown.page import write_page
from pipeline.card.shown.picture import card_picture
from pipeline.card.verdict import verdict_of
from pipeline.config.config import Config
from pipeline.context import Context, result_line
from pipeline.embed.image_reader import ImageReader
from pipeline.errors import PipelineError
from pipeline.evaluate.health import alarm
from pipeline.evaluate.teacher import EvaluationSpec, Evaluator
from pipeline.heartbeat import now
from pipeline.stages.evaluation import chosen, is_own, request_of, teacher, trained_plan
from pipeline.stages.tracked import pipeline_page
from pipeline.storage.mirror import mirrored
from pipeline.storage.run_folder import RunFolder, fingerprint
from pipeline.train.checkpoint import state
from pipeline.train.evaluator import evaluation_spec
from pipeline.uri import join, public

log = logging.getLogger("pipeline.evaluate")
PAGE = "card.html"
HEALTH = ("feature_std", "effective_rank")  # that have been `health/…` from the beginning
SAID = ("step0", "init", "untrained", "raw_pixels", "colours", "majority")


def key(context: Context) -> str:
    """Changes with the models, the images, and all settings that scores depend on."""
    request = request_of(context)
    settings = context.config.evaluate.model_dump(mode="json", exclude={"cards"})
    sets = request.sets.each if request.sets else {}
    digests: dict[str, list[Any]] = {
        what: [one.digest, one.class_names] for what, one in sets.items()
    }
    if request.dense is not None:
        dense = (request.dense.reference, request.dense.queries)
        digests["dense"] = [one and one.digest for one in dense]
    asked = [request.groups, request.max_pixels, request.scoring.seed]
    networks = [one.identity for one in request.networks]
    return fingerprint([VERSION, networks, settings, digests, asked])


def intact(context: Context) -> bool:
    """Whether the card of a finished stage is still there."""
    return all((context.folder.path / "evaluate" / name).is_file() for name in (CARD, PAGE))


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Makes the card, and tells MLflow and the console what is on it."""
    request = request_of(context)
    card = evaluate(request)
    health = _health(context) if is_own(context.config) else {}
    numbers = numbers_of(card)
    numbers["model"] |= health
    sentence = _alarm(context, numbers["model"])
    if sentence:
        log.warning("%s", sentence)
        card = replace(card, verdict=verdict_of(card, facts_of(request, card, sentence)))
    folder = context.folder.path / "evaluate"
    if text := replaced(card, folder):
        log.warning("evaluate    %s", text)
    write_card(card, folder)
    readers = readers_of(request)
    pictures = pictures_of(readers, request.max_pixels)
    write_page(card, folder / PAGE, pictures, request.networks[0].spec.name)
    write_examples(examples_of(request, pictures, readers), folder)
    # MLflow shows the values of the highest step: of models that are named they share one, so that
    # a later evaluation in this run folder takes the place of an earlier one.
    step = (request.networks[0].step or 0) if is_own(context.config) else 0
    main = card.contenders[0]
    tracker.metrics(step, metrics_of(card) | health)
    text = sentence_of(card, request)
    if card.score in main.results:
        tracker.headline(
            step, {f"eval/{card.score}_final": main.results[card.score].interval.value}
        )
    tracker.picture("card", step, card_picture(card))
    for one in (tracker, context.tracking.tracker):
        one.tags(pipeline_page.verdict_tags(card))
        for each in pipeline_page.datasets_of(card):
            name, source = pipeline_page.short_name(each.name), public(each.name)
            one.dataset(name, each.digest, source, "evaluation", each.images)
    for name in (PAGE, CARD):
        tracker.artifact(folder / name, "evaluate")
    result_line("evaluate", text)
    if context.only:  # a whole run names its report at its end, which leads there
        result_line("card", public(context.folder.at("evaluate", PAGE)))
    if sentence and sentence not in card.verdict.text:
        text = f"{text}. Alarm: {sentence}"
    parts = [card.verdict.text, pipeline_page.score_table(card), text]
    tracker.note("\n\n".join(filter(None, parts)))
    tracker.table("evaluation", table_of(card))
    result: dict[str, Any] = {
        "text": text,
        "verdict": card.verdict.text,
        "rule": card.verdict.rule,
        "page": f"evaluate/{PAGE}",
        "remarks": list(card.remarks),
    }
    if is_own(context.config):  # what the export says of these weights
        asked = pipeline_page.datasets_of(card)[0]
        result |= {"step": step, "trained": numbers.pop("model")}
        result |= {"data": [pipeline_page.short_name(asked.name), asked.digest]}
    return result | numbers


def compare(config: Config) -> None:
    """`jobs/evaluate.py cards=[…]`: cards that are there already, on one page; nothing is computed.

    Raises:
        PipelineError: fewer than two cards are named, or one is not there.
    """
    folder = RunFolder.of(config.run.folder, config.run.name)
    with folder.locked(), mirrored(folder, lambda names: None) as push:
        verdict = compare_cards(config.evaluate.cards, folder.path / "evaluate")
        push()
    result_line("page", public(folder.at("evaluate", COMPARED)))
    result_line("verdict", verdict)


# ---- What is told of a card.


def replaced(card: Card, folder: Path) -> str:
    """A sentence on the card that one takes the place of, where that is of others; else ""."""
    try:
        earlier = read_card(folder, terms=False)
    except (PipelineError, OSError):  # none, or a damaged one
        return ""
    named = [
        (one.contenders[0].name, one.reference.name, one.queries and one.queries.name)
        for one in (earlier, card)
    ]
    if named[0] == named[1]:
        return ""
    model, reference, _ = named[0]
    return f"the earlier card, of {model} on {reference}, is overwritten: run.name=… keeps both"


def metrics_of(card: Card) -> dict[str, float]:
    """The scores by their names in MLflow: `eval/<score>` of the first model, with `_step0`,
    `_raw_pixels` … of what stands beside it, and with a short form of its name of any other model.
    """
    models = [one.name for one in card.contenders if one.role == "model"]
    slugs = dict(zip(models, _slugs(models), strict=True))
    metrics: dict[str, float] = {}
    for one in card.contenders:
        whose = slugs.get(one.of or (one.name if one.role == "model" else ""), "")
        ends = ["" if one.role == "model" else f"_{one.role}"]
        if one.role == "init":  # it is the network at step 0 too
            ends.append("_step0")
        for name, result in one.results.items():
            for end in ends:
                metrics[f"eval/{name}{whose}{end}"] = result.interval.value
            if name in HEALTH and one.role == "model" and not whose:
                metrics[f"health/{name}"] = result.interval.value
    return metrics


def _slugs(names: list[str]) -> list[str]:
    """An end for the metrics of each model: none for the first one."""
    slugs = [""]
    for name in names[1:]:
        slug = "_" + re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
        slugs.append(slug if slug not in slugs else f"{slug}_{len(slugs)}")
    return slugs


def numbers_of(card: Card) -> dict[str, dict[str, float]]:
    """The scores of the first model and of what stands beside it, by role."""
    main = card.contenders[0]
    numbers: dict[str, dict[str, float]] = {}
    for one in card.contenders:
        if one is main or (one.role != "model" and one.of in ("", main.name)):
            values = {f"eval/{name}": x.interval.value for name, x in one.results.items()}
            health = {
                f"health/{n}": x.interval.value for n, x in one.results.items() if n in HEALTH
            }
            numbers[one.role] = values | health
    if "init" in numbers:
        numbers.setdefault("step0", numbers["init"])
    return numbers


def sentence_of(card: Card, request: Request) -> str:
    """The score that decides, of the first model and of all that stands beside it."""
    main = card.contenders[0]
    if card.score not in main.results or not request.labelled:
        scores = {n: x for n, x in main.results.items() if x.score is None} or main.results
        listed = ", ".join(f"{name} {one.interval.value:.3g}" for name, one in scores.items())
        unlabelled = ["no labels"] * (not request.labelled and request.sets is not None)
        return "; ".join(filter(None, [*unlabelled, listed, *card.remarks]))
    value = main.results[card.score].interval.value
    step = request.networks[0].step
    text = f"{_shown(card.score)} {value:.4f}{f' at step {step}' if step is not None else ''} "
    text += f"({compared(card)})"
    beside = [
        f"{_named(one)} {one.results[card.score].interval.value:.4f}"
        for one in card.contenders[1:]
        if card.score in one.results
    ]
    return "; ".join([text, *filter(None, [", ".join(beside)]), *card.remarks])


def _named(one: Contender) -> str:
    from pipeline.card.card import BASELINES

    return one.name if one.role == "model" else BASELINES[one.role]


def _shown(score: str) -> str:
    match = re.fullmatch(r"knn(\d+)_top1", score)
    return f"kNN-{match[1]} top-1" if match else score.replace("_", " ")


def compared(card: Card) -> str:
    """`576 queries by 3,440 reference images`."""
    if card.queries is None:
        return f"each of {card.reference.images:,} images by the others"
    return f"{card.queries.images:,} queries by {card.reference.images:,} reference images"


def table_of(card: Card) -> dict[str, list[Any]]:
    """The score that decides, a row for each contender that has it."""
    rows = [one for one in card.contenders if card.score in one.results]
    intervals = [one.results[card.score].interval for one in rows]
    return {
        "what": [public(one.name) for one in rows],
        "role": [one.role for one in rows],
        "score": [card.score] * len(rows),
        "value": [one.value for one in intervals],
        "low": [one.low for one in intervals],
        "high": [one.high for one in intervals],
        "of": [compared(card)] * len(rows),
    }


def image_of(request: Request) -> ImageOf:
    """Small pictures by image id, of either set; None where only vectors are there."""
    return pictures_of(readers_of(request), request.max_pixels)


def readers_of(request: Request) -> list[ImageReader]:
    """Readers of the encoded images of the sets; none where only vectors are there."""
    tables, sets = join(request.folder, "vectors"), request.sets
    return images_of(tables, request.networks[0], sets) if sets else []


# ---- The health of a run's own teacher, which needs its heads.


def _health(context: Context) -> dict[str, float]:
    """Of the run's own teacher on training images: entropy of its targets, prototypes in use."""
    import ray

    saved = chosen(context)
    plan = trained_plan(saved)
    current = {"evaluate": context.config.evaluate, "data": context.config.data}
    plan = plan.model_copy(update={"config": plan.config.model_copy(update=current)})
    spec = evaluation_spec(plan, context.shards())
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 and plan.device == "cuda" else 0
    task = ray.remote(_measured).options(num_cpus=1, num_gpus=gpus)
    now(f"evaluate: the targets of the teacher of step {saved.step}")
    health: dict[str, float] = ray.get(task.remote(spec, saved, "cuda" if gpus else "cpu"))
    return health


def _measured(spec: EvaluationSpec, saved: state.Saved, device: str) -> dict[str, float]:
    evaluator = Evaluator(spec, len(os.sched_getaffinity(0)), device)
    temperature = trained_plan(saved).at(max(0, saved.step - 1)).teacher_temperature
    return evaluator.target_health(teacher(saved), temperature)


def _alarm(context: Context, numbers: dict[str, float]) -> str:
    """A sentence where the run's own teacher has collapsed; else ""."""
    if not is_own(context.config) or chosen(context).step == 0:  # its heads are new
        return ""
    return alarm(numbers, trained_plan(chosen(context)).config.head.prototypes) or ""
