"""Whole cards of planted truth, and their scores against the network in memory."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.card.card import Card
from pipeline.card.files import read_card
from pipeline.card.inputs.common import common
from pipeline.card.run import evaluate
from pipeline.config.load import load
from pipeline.context import Context
from pipeline.embed.beginnings import passes_over
from pipeline.embed.vectors import open_vectors
from pipeline.errors import PipelineError
from pipeline.evaluate.baselines import pixel_vectors, without_mean
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.neighbours.knn import knn_classify
from pipeline.evaluate.teacher import EvaluationSpec, Evaluator
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan
from pipeline.shards.shards import open_shards
from pipeline.stages import evaluate as stage
from pipeline.stages.evaluation import request_of, teacher
from pipeline.storage.run_folder import RunFolder
from pipeline.train import build
from pipeline.train.checkpoint import state
from pipeline.train.checkpoint.best import Best, write_best
from pipeline.train.evaluator import evaluation_spec
from pipeline.train.run import plan_for
from pipeline.train.start import starting_pair
from pipeline.uri import parent
from tests.card.conftest import COLOURS, coloured
from tests.data import hub_table, stored
from tests.tiny import write_tiny

pytestmark = pytest.mark.usefixtures("ray_here")
NAMES = list(COLOURS)


def labelled_set(folder: Path, numbers: range, names: list[str], *broken: bytes) -> Any:
    each = [(NAMES[n % 3], coloured(NAMES[n % 3], n)) for n in numbers]
    images = [image for _, image in each] + list(broken)
    labels = [names.index(name) for name, _ in each] + [0] * len(broken)
    return stored(hub_table(images, labels, names), folder / "part.parquet", 16)


class Trained:
    """A run whose teacher is not its first network, and labelled sets in two orders of classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reference = labelled_set(folder / "reference", range(60), NAMES, b"broken")
        labelled_set(folder / "queries", range(60, 90), NAMES[::-1])
        changes = {"queries": f"{folder}/queries", "k": 5}
        self.recipe = write_tiny(folder / "tiny.yaml", evaluate=changes)
        config = self.config()
        plan = plan_for(config, self.reference, Machine(cpus=2, gpus=0, bfloat16=False))
        network = build.pair(config).teacher
        with torch.no_grad():
            for value in network.backbone.parameters():
                value.add_(0.1 * torch.randn_like(value))
        meta = {"plan": plan.model_dump(mode="json")}
        place = folder / "runs" / "tiny" / "checkpoints"
        self.plan: Plan = plan
        self.saved = state.save(place, 5, {"teacher": network.state_dict()}, meta)

    def config(self, *changes: str) -> Any:
        named = [f"data.shards={self.folder}/reference", f"run.folder={self.folder}/runs"]
        return load([str(self.recipe), *named, *changes])

    def context(self, *changes: str, name: str = "tiny", only: bool = True) -> Context:
        folder = RunFolder.of(f"{self.folder}/runs", name)
        tracking = SimpleNamespace(tracker=Told())
        return Context(self.config(*changes), folder, tracking=tracking, only=only)

    def card(self, *changes: str, name: str = "tiny") -> Card:
        return evaluate(request_of(self.context(*changes, name=name)))


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return Trained(tmp_path)


def value(card: Card, role: str, score: str) -> float:
    one = next(one for one in card.contenders if one.role == role)
    return one.results[score].interval.value


def pixel_features(spec: EvaluationSpec) -> list[LabelledFeatures]:
    """Small pixels of reference and queries as they are decoded, less the mean of the reference."""
    evaluator = Evaluator(spec)
    sets = [list(evaluator.parts(x, None)) for x in (spec.reference, spec.queries) if x]
    images = [np.concatenate([part.images for part in parts]) for parts in sets]
    small = without_mean(*(pixel_vectors(x) for x in images))
    return [
        LabelledFeatures(
            x,
            torch.from_numpy(np.concatenate([part.labels for part in parts])),
            np.concatenate([part.ids for part in parts]),
        )
        for x, parts in zip(small, sets, strict=True)
    ]


def with_best(trained: Trained, score: str, *evaluated: int) -> None:
    """The checkpoint of `Trained` is the best of several by a score, on the queries."""
    queries = open_shards(f"{trained.folder}/queries", "image", "label")
    best = Best(5, 0.7, score, "any", queries.digest, evaluated)
    write_best(trained.folder / "runs" / "tiny" / "checkpoints", best)


def test_a_card_says_of_how_many_evaluations_its_model_is_the_best(trained: Trained) -> None:
    assert request_of(trained.context()).networks[0].best_of == 1  # nothing was chosen
    key = stage.key(trained.context())
    with_best(trained, "eval/knn5_top1", 5, 10, 12)
    own = request_of(trained.context())
    assert stage.key(trained.context()) != key
    # the same weights by the name of their run, their images by another place: another job
    shutil.copytree(trained.folder / "queries", trained.folder / "elsewhere")
    asked = [f"evaluate.queries={trained.folder}/elsewhere", f"evaluate.reference={trained.folder}"]
    named = request_of(
        trained.context(
            f"evaluate.models=[{trained.folder}/runs/tiny]", asked[0], f"{asked[1]}/reference"
        )
    )
    for request in (own, named):
        others = [1] * (len(request.networks) - 1)
        assert [one.best_of for one in request.networks] == [3, *others]
    # another score, the last checkpoint, other images or no labels: nothing was chosen by this
    for changes in (
        ["evaluate.k=10"],
        ["export.checkpoint=last"],
        [f"evaluate.queries={trained.folder}/reference"],
        ["evaluate.decide_by=rank_me"],
    ):
        other = request_of(trained.context(*changes))
        assert other.networks[0].best_of == 1, changes


def test_passes_are_those_that_were_done(trained: Trained) -> None:
    """A run that was stopped, and whose best checkpoint is not its last."""
    plan = trained.plan.model_copy(update={"steps": 1000})
    place = parent(trained.saved.path)[0]
    state.save(place, 12, {"teacher": {}}, {"plan": plan.model_dump(mode="json")})
    assert passes_over(str(trained.saved.path)) == pytest.approx(12 / plan.steps_per_pass)


def test_another_checkpoint_of_the_run_was_not_chosen(trained: Trained) -> None:
    with_best(trained, "eval/knn5_top1", 5, 10, 12)
    place = parent(trained.saved.path)[0]
    meta = {"plan": trained.plan.model_dump(mode="json")}
    other = state.save(place, 10, {"teacher": teacher(trained.saved).state_dict()}, meta)
    models = f"evaluate.models=[{other.path},{trained.saved.path}]"
    request = request_of(trained.context(models, f"evaluate.reference={trained.folder}/reference"))
    count = {one.name: one.best_of for one in request.networks if one.role == "model"}
    assert sorted(count.values()) == [1, 3] and count["runs/tiny (step 10)"] == 1


def test_a_start_that_was_chosen_is_no_worse_by_that(trained: Trained) -> None:
    """The weights that a run began with were the best of an earlier run on the same images."""
    with_best(trained, "eval/knn5_top1", 5, 10, 12)
    plan = trained.plan.model_copy(update={"init": str(trained.saved.path)})
    tensors = {"teacher": teacher(trained.saved).state_dict()}
    meta = {"plan": plan.model_dump(mode="json")}
    state.save(trained.folder / "runs" / "next" / "checkpoints", 7, tensors, meta)
    request = request_of(trained.context(name="next"))
    count = {one.role: one.best_of for one in request.networks}
    assert count == {"model": 1, "init": 3, "untrained": 1}


def test_what_training_writes_is_what_a_card_compares(trained: Trained) -> None:
    """The digest of the images that are asked, of a sample as of all of them."""
    spec = evaluation_spec(trained.plan, trained.reference)
    sets = request_of(trained.context()).sets
    assert sets is not None and sets.queries is not None
    assert spec.evaluated_on(10).asked == sets.queries.digest_of_all
    sample = replace(sets.queries, shards=replace(sets.queries.shards, packed=True)).first(7)  # type: ignore[type-var]
    assert sample.digest != sets.queries.digest
    assert sample.digest_of_all == sets.queries.digest_of_all


def test_the_choice_is_on_the_card(trained: Trained) -> None:
    with_best(trained, "eval/knn5_top1", 5, 10, 12)
    card = trained.card("evaluate.scores=[knn]")
    model, *others = card.contenders
    assert model.best_of == 3 and {one.best_of for one in others} == {1}
    assert any(f"{model.name} was chosen as the best of 3" in remark for remark in card.remarks)


def test_a_single_evaluation_is_no_choice(trained: Trained) -> None:
    with_best(trained, "eval/knn5_top1", 5)
    request = request_of(trained.context())
    assert request.networks[0].best_of == 1


@pytest.mark.long
def test_scores_are_those_of_the_network_in_memory(trained: Trained) -> None:
    card = trained.card("evaluate.scores=[knn,unlabelled]")
    spec: EvaluationSpec = evaluation_spec(trained.plan, trained.reference)
    networks = {
        "model": teacher(trained.saved).backbone,
        "step0": starting_pair(trained.plan)[0].teacher.backbone,
    }
    for role, network in networks.items():
        evaluator = Evaluator(spec)
        expected = evaluator.run(network).metrics
        reference, queries = (
            evaluator.features(network, x, None) for x in (spec.reference, spec.queries) if x
        )
        knn = knn_classify(reference, queries, [5, 10, 20, 100, 200])
        for k, accuracy in knn.items():
            assert value(card, role, f"knn{k}_top1") == pytest.approx(accuracy), (role, k)
        for name in ("feature_std", "effective_rank"):
            known = expected[f"health/{name}"]
            assert value(card, role, name) == pytest.approx(known, rel=1e-4), (role, name)
    pixels = knn_classify(*pixel_features(spec), 5)[5]
    assert value(card, "raw_pixels", "knn5_top1") == pytest.approx(pixels, abs=1e-9)
    assert value(card, "majority", "knn5_top1") == pytest.approx(1 / 3)
    assert value(card, "colours", "knn5_top1") == 1.0  # one colour a class
    assert (card.reference.images, card.queries and card.queries.images) == (60, 30)
    assert "not scored, for they could not be decoded: 1 of the images" in card.remarks
    confusion = card.confusion
    assert sum(confusion.images) == 30 and confusion.is_whole
    assert sum(confusion.right) / 30 == pytest.approx(value(card, "model", "knn5_top1"))
    assert len(card.wrong) == 30 - sum(confusion.right)


def test_copies_are_looked_for_by_models_and_baselines_of_images(trained: Trained) -> None:
    card = trained.card("evaluate.scores=[knn,copies,unlabelled]")
    names = {one.role: set(one.results) for one in card.contenders}
    copies, stored = {"copies_recall1", "copies_map"}, {"rank_me", "uniformity", "feature_std"}
    assert names["model"] >= copies | stored | {"alignment", "patch_smoothness"}
    assert names["step0"] >= stored | {"patch_smoothness"}
    assert not names["step0"] & (copies | {"alignment"})
    for role in ("raw_pixels", "colours"):
        assert names[role] >= copies and not names[role] & stored
    assert value(card, "colours", "copies_recall1") < value(card, "raw_pixels", "copies_recall1")
    results = [one.results["copies_recall1"] for one in card.contenders if copies < names[one.role]]
    assert len({result.score.images for result in results if result.score}) == 1
    assert {result.details["database"] for result in results} == {30}
    assert not any("copy detection" in remark for remark in card.remarks)


def test_one_labelled_set_is_scored_by_leaving_one_out(trained: Trained) -> None:
    card = trained.card("evaluate.queries=", "evaluate.scores=knn")
    assert card.queries is None
    network = teacher(trained.saved).backbone
    rows = Evaluator(evaluation_spec(trained.plan, trained.reference)).features(
        network, trained.reference, None
    )
    expected = knn_classify(rows, rows, [5, 200])
    assert value(card, "model", "knn5_top1") == pytest.approx(expected[5])


def test_models_are_scored_side_by_side_and_a_run_beside_what_it_began_as(
    trained: Trained,
) -> None:
    run = f"{trained.folder}/runs/tiny"
    given = [f"evaluate.reference={trained.folder}/reference", "evaluate.scores=knn"]
    card = trained.card(f"evaluate.models=[descriptor,{run}]", *given, name="other")
    roles = [one.role for one in card.contenders]
    assert roles == ["model", "model", "step0", "raw_pixels", "colours", "majority"]
    assert card.contenders[2].of == card.contenders[1].name == "runs/tiny (step 5)"
    own = trained.card("evaluate.scores=knn")
    for score in ("knn5_top1", "knn20_top1"):
        beside = card.contenders[1].results[score].interval
        assert beside == own.contenders[0].results[score].interval, score
    assert any("their own image_size: descriptor 256" in remark for remark in card.remarks)
    metrics = stage.metrics_of(card)
    slug = stage._slugs([one.name for one in card.contenders[:2]])[1]
    assert metrics[f"eval/knn5_top1{slug}"] == own.contenders[0].results["knn5_top1"].interval.value
    assert f"eval/knn5_top1{slug}_step0" in metrics
    assert metrics["eval/knn5_top1_colours"] == 1.0


def test_vectors_are_scored_without_opening_an_image(trained: Trained) -> None:
    card = trained.card("evaluate.scores=knn")
    tables = trained.folder / "runs/tiny/evaluate/vectors/00-model"
    for shards in ("reference", "queries"):
        (trained.folder / shards / "part.parquet").unlink()
    given = [f"evaluate.{name}={tables}/{name}" for name in ("reference", "queries")]
    again = trained.card(*given, "evaluate.scores=knn", name="vectors")
    roles = [one.role for one in again.contenders]
    assert roles == ["model", "raw_pixels", "colours", "majority"]  # columns of that table
    for score, result in card.contenders[0].results.items():
        assert again.contenders[0].results[score].interval == result.interval
    assert again.confusion == card.confusion


def test_what_cannot_be_compared_is_refused(trained: Trained) -> None:
    trained.card("evaluate.scores=knn")
    tables = trained.folder / "runs/tiny/evaluate/vectors/00-model"
    shards = f"evaluate.queries={trained.folder}/queries"
    cases = {
        "holds vectors, evaluate.queries=": [f"evaluate.reference={tables}/reference", shards],
        "holds vectors of a model": [
            f"evaluate.reference={tables}/reference",
            "evaluate.models=descriptor",
        ],
        "names one model twice": ["evaluate.models=[descriptor,descriptor]"],
        "no embedder: there is no": ["evaluate.models=/nowhere/weights"],
    }
    for sentence, given in cases.items():
        with pytest.raises(PipelineError) as error:
            request_of(trained.context(*given, name="other"))
        assert sentence in error.value.what, sentence


def test_an_image_that_one_model_lacks_is_left_out_of_all(trained: Trained) -> None:
    trained.card("evaluate.scores=knn")
    whole = open_vectors(f"{trained.folder}/runs/tiny/evaluate/vectors/00-model/queries")
    rows = SimpleNamespace(ids=whole.ids(), vectors=whole.read())
    from dataclasses import replace

    few = replace(whole, parts=whole.parts[:1])
    assert common([whole, whole]) == ([whole, whole], 0)
    (left, right), dropped = common([whole, few])
    assert dropped == whole.rows - few.rows
    np.testing.assert_array_equal(left.ids(), right.ids())
    kept = np.isin(rows.ids, few.ids())
    np.testing.assert_array_equal(left.read(), rows.vectors[kept])
    np.testing.assert_array_equal(left.labels(), whole.labels()[kept])


class Told:
    """A tracker that remembers what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **_: self.calls.append((name, arguments))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.mark.long
def test_the_stage_tells_mlflow_and_leaves_what_it_says(trained: Trained) -> None:
    context, told = trained.context(only=False), Told()
    before = stage.key(context)
    result = stage.run(context, told)
    ((step, metrics),) = told.of("metrics")
    assert step == result["step"] == 5
    knn = {"", "_step0", "_raw_pixels", "_colours", "_majority"}
    assert {f"eval/knn5_top1{end}" for end in knn} <= set(metrics)
    health = ("feature_std", "effective_rank", "teacher_entropy", "prototypes_used")
    assert {f"health/{name}" for name in health} <= set(metrics)
    assert metrics["eval/knn5_top1"] == result["trained"]["eval/knn5_top1"]
    assert told.of("headline") == [(5, {"eval/knn5_top1_final": metrics["eval/knn5_top1"]})]
    assert {"trained", "step0", "raw_pixels", "colours", "majority"} <= set(result)
    assert "linear_top1" not in " ".join(metrics)  # minutes, which a chain does not spend
    assert [arguments[0] for arguments in told.of("picture")] == ["card"]
    assert told.of("note")[0][0].startswith(result["verdict"])
    assert stage.intact(context) and stage.key(context) == before
    assert stage.key(trained.context("evaluate.k=6")) != before
    (context.folder.path / "evaluate" / "card.html").unlink()
    assert not stage.intact(context)


@pytest.mark.long
def test_an_alarm_of_the_teacher_reaches_the_verdict(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = "health/teacher_entropy is 0.001 nats; start again with a lower optim.lr."
    monkeypatch.setattr(stage, "alarm", lambda numbers, prototypes: sentence)
    context, told = trained.context("evaluate.scores=knn"), Told()
    result = stage.run(context, told)
    assert sentence in result["verdict"] and sentence not in result["text"], result
    assert read_card(context.folder.path).verdict.text == result["verdict"]
    assert told.of("note")[0][0].count(sentence) == 1
