"""Makes an evaluation card; needs a Ray to be joined. Start at `evaluate`.

One pass of each network over each set gives tables of vectors. All scores are read from these: the
nearest neighbours in blocks over Ray tasks, everything else in a task for each contender and group.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pipeline.card.card import Card, Contender, SetFacts
from pipeline.card.dense.sets import DenseSet
from pipeline.card.inputs.common import common
from pipeline.card.inputs.entrants import entrants_of
from pipeline.card.inputs.networks import Network
from pipeline.card.inputs.tables import Embedding, Tables, embedded, of_vectors, remove_baselines
from pipeline.card.scoring import tasks
from pipeline.card.scoring.request import Request
from pipeline.card.scoring.scores import Answers
from pipeline.card.scoring.tasks import Growing
from pipeline.card.verdict import Facts, ModelFacts, verdict_of
from pipeline.card.words import chosen
from pipeline.evaluate.deciding import why_unusable
from pipeline.uri import join, public

log = logging.getLogger("pipeline.evaluate")


def evaluate(request: Request) -> Card:
    """Scores all contenders on the same images.

    Raises:
        PipelineError: a model or a set cannot be used.
    """
    tables, remarks = _tables(request)
    contenders = _contenders(request, tables)
    request = replace(request, unusable=_unusable(request, contenders))
    answers = tasks.score_neighbours(request, contenders)
    remarks += tasks.score_vectors(request, contenders)
    remarks += tasks.score_linear(request, contenders)
    remarks += tasks.score_dense(request, contenders)
    tasks.score_majority(request, contenders)
    remove_baselines(tables)
    card = _card(request, contenders, answers, remarks)
    return replace(card, verdict=verdict_of(card, facts_of(request, card)))


def facts_of(request: Request, card: Card, alarm: str = "") -> Facts:
    """What the verdict needs beside the card.

    Args:
        request: what was asked for.
        card: with all scores.
        alarm: the sentence of `evaluate.health.alarm` on the first model, where there is one.
    """
    overlap = request.sets.overlap if request.sets else None
    has = any(card.score in one.results for one in card.contenders if one.role == "model")
    missing = f"it was not computed; evaluate.scores is {', '.join(request.groups)}"
    missing = "" if has else request.unusable or missing
    models = {
        one.name: ModelFacts(
            one.images,
            alarm if one is request.networks[0] else "",
            one.passes,
        )
        for one in request.networks
        if one.role == "model"
    }
    return Facts(
        models,
        shared=overlap.known or 0 if overlap else 0,
        vectors_only=bool(request.sets and request.sets.from_vectors),
        missing=missing if request.labelled else "",
    )


# ---- One pass of each network over each set.


def _tables(request: Request) -> tuple[list[Tables], list[str]]:
    """The vectors of the images that all networks have, and what is to be said of them."""
    said, sets = list(request.remarks), request.sets
    said += [chosen(one.name, one.best_of) for one in request.networks if one.best_of > 1]
    if sets is None:
        return [], said
    said += sets.overlap.sentences() if sets.overlap else []
    if sets.from_vectors:
        tables = [of_vectors(request.networks[0], sets)]
        if request.labelled and "pixels" not in tables[0].reference.outputs:
            said.append("vectors were given, so there are no baselines of pixels and colours")
        return tables, said
    outputs = ("cls", "mean", "blocks") if request.has("linear") else ("cls",)
    beside = ("pixels", "colours") if sets.labelled else ()
    folder = join(request.folder, "vectors")
    how = Embedding(folder, outputs, beside, request.max_pixels, request.gpu)
    tables, left_out = embedded(request.networks, sets, how)
    for what in sets.each:
        same, dropped = common([one.each[what] for one in tables])
        tables = [one.with_set(what, kept) for one, kept in zip(tables, same, strict=True)]
        if dropped:
            said.append(
                f"{dropped:,} images of the {what} could not be embedded by all models and are "
                "left out of all"
            )
    if sets.labelled and not any("pixels" in one.reference.outputs for one in tables):
        said.append(
            "the descriptor sees small grey images, so there are no baselines of pixels and colours"
        )
    if bad := max(one.bad for one in tables):
        said.append(f"not scored, for they could not be decoded: {bad:,} of the images")
    return tables, [*said, *left_out, *_unlike(tables)]


def _unlike(tables: Sequence[Tables]) -> list[str]:
    """Says where models see the same images in other ways."""
    models = [one for one in tables if one.network.role == "model"]
    said = []
    for what in ("image_size", "mean", "std"):
        values = {one.network.name: one.reference.facts[what] for one in models}
        if len({str(value) for value in values.values()}) > 1:
            each = ", ".join(f"{name} {value}" for name, value in values.items())
            said.append(f"models see images with their own {what}: {each}")
    return said


def _contenders(request: Request, tables: Sequence[Tables]) -> list[Growing]:
    """All that are scored: networks, and plain images where there are vectors of them."""
    if request.sets is None:
        return [
            Growing(Contender(one.role, one.name, one.of, facts=_facts_of(one)), one)
            for one in request.networks
        ]
    contenders = []
    for entrant in entrants_of(tables, request.sets):
        network = entrant.tables.network if entrant.is_network else None
        facts = _facts_of(network, entrant.tables) if network else {}
        named = Contender(entrant.role, entrant.name, entrant.of, facts=facts)
        contenders.append(Growing(named, network, entrant))
        if network:
            contenders[-1].cost["embed"] = round(entrant.tables.seconds, 2)
    return contenders


def _unusable(request: Request, contenders: Sequence[Growing]) -> str:
    """Why images of one labelled set cannot be classified by the others: hardly any class has two.
    That all are of one class is seen by the scores.
    """
    entrant, sets = contenders[0].entrant, request.sets
    if entrant is None or sets is None or sets.queries is not None or not sets.labelled:
        return ""
    labels = entrant.labels(entrant.tables.reference).labels
    known = labels[labels >= 0]
    return why_unusable(labels) if len(known) and bool((known != known[0]).any()) else ""


def _facts_of(network: Network, tables: Tables | None = None) -> dict[str, Any]:
    known = tables.reference.facts if tables else {}
    shown = ("digest", "image_size", "dim", "precision", "mean", "std")
    facts = {name: known[name] for name in shown if name in known}
    if network.step is not None:
        facts["step"] = network.step
    if network.start:
        facts["started_from"] = public(network.start)
    if network.best_of > 1:
        facts["best_of"] = network.best_of
    return {"digest": network.spec.digest} | facts


# ---- The card.


def _card(
    request: Request, contenders: Sequence[Growing], answers: Answers, remarks: Sequence[str]
) -> Card:
    reference, queries = _set_facts(request, contenders[0])
    return Card(
        title=request.title,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        score=request.score,
        reference=reference,
        queries=queries,
        contenders=tuple(one.finished() for one in contenders),
        remarks=tuple(dict.fromkeys(remarks)),
        settings=_settings(request),
        confusion=answers.confusion,
        wrong=answers.wrong,
    )


def _settings(request: Request) -> dict[str, Any]:
    scoring, sets = request.scoring, request.sets
    votes = {"k": scoring.k, "temperature": scoring.temperature} if sets else {}
    dense = {} if request.dense is None else {"dense size": request.dense.settings.size}
    classes = list(sets.classes.names) if sets else []
    return {**votes, "seed": scoring.seed, **dense, "classes": classes}


def _set_facts(request: Request, first: Growing) -> tuple[SetFacts, SetFacts | None]:
    entrant, sets = first.entrant, request.sets
    if entrant is None or sets is None:
        assert request.dense is not None
        dense = request.dense
        return _of_dense(dense.reference), _of_dense(dense.queries) if dense.queries else None
    known = {}
    for what, one in sets.each.items():
        labels = entrant.labels(entrant.tables.each[what]).labels
        known[what] = one.facts(len(labels), int((labels >= 0).sum()))
    return known["reference"], known.get("queries")


def _of_dense(dense: DenseSet) -> SetFacts:
    return SetFacts(public(dense.uri), dense.digest, len(dense.rows), len(dense.rows))
