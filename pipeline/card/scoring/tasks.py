"""All scores of all contenders: neighbours in blocks over tasks, everything else a task each."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.card.card import BASELINES, Contender, Result, Role
from pipeline.card.dense.results import dense_baselines, dense_results
from pipeline.card.inputs.entrants import Entrant
from pipeline.card.inputs.networks import Network
from pipeline.card.linear.scores import LabelledTable, linear_scores
from pipeline.card.nearest import neighbours
from pipeline.card.probe import Probe, Probed, probe
from pipeline.card.scoring import scores
from pipeline.card.scoring.request import Request
from pipeline.card.scoring.scores import Answers
from pipeline.embed.pool import as_ours, mistake_of
from pipeline.embed.vectors import VectorSet
from pipeline.errors import DataError, PipelineError, StorageError
from pipeline.heartbeat import now

log = logging.getLogger("pipeline.evaluate")
IN_TASKS = ("logistic", "few_shot", "retrieval")  # of vectors, of every contender
GROUPS = {  # for people
    "probe": "scores without labels",
    "logistic": "logistic regression",
    "few_shot": "few-shot scores",
    "retrieval": "retrieval scores",
}


@dataclass
class Growing:
    """A contender whose results come one after the other.

    Attributes:
        contender: without results.
        network: whose it is; None of plain images.
        entrant: where its vectors are; None where only dense scores are asked for.
    """

    contender: Contender
    network: Network | None = None
    entrant: Entrant | None = None
    results: dict[str, Result] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)

    def add(self, group: str, results: Mapping[str, Result], seconds: float) -> None:
        """Takes the results of a group."""
        self.results |= results
        self.cost[group] = round(self.cost.get(group, 0) + seconds, 2)

    def finished(self) -> Contender:
        """With all that has come."""
        return replace(self.contender, results=self.results, cost=self.cost)


def score_neighbours(request: Request, contenders: Sequence[Growing]) -> Answers:
    """k-NN of all contenders, in blocks over tasks; what the first one answers."""
    answers = Answers()
    for one in contenders if request.has("knn") else ():
        entrant = one.entrant
        assert entrant is not None
        begin = time.monotonic()
        tables, k = entrant.tables, max(request.scoring.ks)
        centre = entrant.output == "pixels"
        both = (tables.reference, tables.queries)
        nearest = neighbours(*both, k, entrant.output, _gpus(request) > 0, centre)
        results, answered = scores.of_neighbours(entrant, nearest, request.scoring)
        one.add("knn", results, time.monotonic() - begin)
        if one is contenders[0]:
            answers = answered
    return answers


def score_vectors(request: Request, contenders: Sequence[Growing]) -> list[str]:
    """Every other group of scores of every contender in a task of its own; what is to be said."""
    import ray

    gpus = _gpus(request)
    options = {"num_cpus": 1, "num_gpus": gpus}
    task, probing = (ray.remote(f).options(**options) for f in (scores.scored, probed))
    waiting: dict[Any, tuple[Growing, str]] = {}
    for one in contenders:
        if (asked := _probe(request, one, gpus > 0)) is not None:
            waiting[probing.remote(asked)] = (one, "probe")
        for group in _groups_of(request, one.entrant):
            reference = task.remote(group, one.entrant, request.scoring, gpus > 0)
            waiting[reference] = (one, group)
    total, said = len(waiting), list[str]()
    while waiting:
        now(f"evaluate: {total - len(waiting)} of {total} scores")
        for reference in ray.wait(list(waiting), num_returns=1)[0]:
            one, group = waiting.pop(reference)
            named = GROUPS.get(group, group)
            answered = _answer(reference, f"{named} of {one.contender.name}")
            if isinstance(answered, DataError):
                if one.contender.role == "model":
                    said.append(_has_none(one.contender.name, named, answered))
                continue
            if group != "probe":
                one.add(group, answered.results, answered.seconds)
                continue
            answer, seconds = answered
            said += answer.remarks if one.contender.role == "model" else ()
            for other in contenders:
                output = other.entrant.output if other.entrant else ""
                if other is one or (other.network is None and output in answer.results):
                    other.add("probe", answer.results[output], seconds if other is one else 0.0)
    return said


def _answer(reference: Any, what: str) -> Any:
    """What a task gives back, or why these images have no such score: the others are still a card.
    Where it fails for another reason, that is said of what it computed.
    """
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(reference)
    except (RayError, DataError) as error:
        mistake = mistake_of(error)
        if isinstance(mistake, DataError) and not isinstance(mistake, StorageError):
            return mistake
        raise as_ours(error, what) from error


def _has_none(name: str, scores_named: str, error: PipelineError) -> str:
    """Warns of scores that a contender lacks; the sentence for the card."""
    sentence = f"{name} has no {scores_named}: {error.what}"
    log.warning("%s", sentence)
    return sentence


def _gpus(request: Request) -> int:
    """Of a task."""
    import ray

    return int(request.gpu and ray.cluster_resources().get("GPU", 0) >= 1)


def probed(asked: Probe) -> tuple[Probed, float]:
    """In a task: what a model says of attacked copies and without labels, and the seconds of it."""
    begin = time.monotonic()
    return probe(asked), time.monotonic() - begin


def _probe(request: Request, one: Growing, gpu: bool) -> Probe | None:
    """What is asked of a network without labels. Copies are made for models alone, and for the
    baselines of plain images in the same pass: they take as long as embedding nine images each.
    """
    groups = tuple(group for group in ("copies", "unlabelled") if request.has(group))
    if one.network is None or one.entrant is None or request.sets is None or not groups:
        return None
    what = "queries" if request.sets.queries else "reference"
    vectors, images = one.entrant.tables.each[what], request.sets.each[what]
    if images.shards is None:
        return Probe(vectors, groups=groups, gpu=gpu)
    spec = one.network.spec
    shards = replace(images.shards, value_range=spec.value_range)
    asked = Probe(vectors, spec, shards, max_pixels=request.max_pixels, gpu=gpu)
    if one.contender.role != "model":
        if "unlabelled" not in groups:
            return None
        return replace(asked, groups=("unlabelled",), attacks=False)
    plain = [name for name in ("pixels", "colours") if name in vectors.outputs]
    return replace(asked, groups=groups, outputs=("cls", *(plain if "copies" in groups else ())))


def _groups_of(request: Request, entrant: Entrant | None) -> list[str]:
    """The groups of scores that a task computes of a contender."""
    return [] if entrant is None else [group for group in IN_TASKS if request.has(group)]


def score_linear(request: Request, contenders: Sequence[Growing]) -> list[str]:
    """The linear grid of the models, whose ranks are tasks of their own: it trains for minutes.
    Says who has none.
    """
    said = list[str]()
    for one in contenders if request.has("linear") else ():
        if one.contender.role != "model" or one.entrant is None:
            continue
        begin = time.monotonic()
        now(f"evaluate: linear layers on {one.contender.name}")
        tables = one.entrant.tables
        reference = _labelled(one.entrant, tables.reference)
        queries = _labelled(one.entrant, tables.queries) if tables.queries else None
        seed = request.scoring.seed
        try:
            score, details = linear_scores(reference, queries, _gpus(request) > 0, seed=seed)
        except StorageError:
            raise
        except DataError as error:
            said.append(_has_none(one.contender.name, "linear layer", error))
            continue
        one.add("linear", {score.name: Result.of(score, **details)}, time.monotonic() - begin)
    return said


def _labelled(entrant: Entrant, vectors: VectorSet) -> LabelledTable:
    rows = entrant.labels(vectors)
    assert rows.ids is not None
    return LabelledTable(vectors, rows.labels.numpy(), rows.ids)


def score_dense(request: Request, contenders: list[Growing]) -> list[str]:
    """Dense scores of all networks, of raw pixels and of a constant; says who has none."""
    dense = request.dense
    if dense is None or not request.has("dense"):
        return []
    said = [*dense.reference.remarks, *(dense.queries.remarks if dense.queries else ())]
    if request.sets is not None:
        said.insert(0, f"dense scores are of {dense.said}")
    settings = replace(dense.settings, gpu=_gpus(request) > 0)
    grid = 0
    for one in [x for x in contenders if x.network]:
        assert one.network is not None
        begin = time.monotonic()
        now(f"evaluate: dense scores of {one.network.name}")
        try:
            results = dense_results(one.network.spec, dense.reference, dense.queries, settings)
        except PipelineError as error:  # without patches: the other scores are still a card
            said.append(_has_none(one.network.name, "dense scores", error))
            continue
        one.add("dense", results, time.monotonic() - begin)
        grid = grid or max(int(r.details.get("grid", 0)) for r in results.values())
    if not grid:
        return said
    begin = time.monotonic()
    now("evaluate: dense scores of raw pixels")
    baselines = dense_baselines(dense.reference, dense.queries, settings, grid)
    for role, results in baselines.items():
        _baseline(contenders, role).add("dense", results, time.monotonic() - begin)
    return said


def score_majority(request: Request, contenders: list[Growing]) -> None:
    """The most frequent class as an answer to all that k-NN is asked."""
    first = contenders[0]
    accuracies = [name for name in first.results if name.startswith("knn")]
    if accuracies and first.entrant is not None:
        results = scores.majority(first.entrant, accuracies)
        _baseline(contenders, "majority").add("knn", results, 0.0)


def _baseline(contenders: list[Growing], role: Role) -> Growing:
    """The contender of a baseline of plain images, which may be new."""
    for one in contenders:
        if one.contender.role == role:
            return one
    contenders.append(Growing(Contender(role, BASELINES[role])))
    return contenders[-1]
