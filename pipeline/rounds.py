"""Train, curate with what was trained, train: a chain of several rounds (`curate.rounds`).

An earlier round is one stage of the chain, `round-1`, between pack and curate. Its folder is a run
folder of its own below the run's, `runs/<name>/round-1`, with curated shards, plan, checkpoints and
reports; its MLflow runs are below one of the pipeline run. The last round is the run itself. All
rounds choose from the shards that are packed once.

The first round curates with what needs no weights, or with `curate.embedder` where the recipe names
one. Each later one goes by the backbone of the round before. After the last one, `rounds` scores
the backbones of all rounds on the same images.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.card.files import CARD, write_card
from pipeline.card.run import evaluate as make_card
from pipeline.card.scoring.request import Request
from pipeline.card.shown.page import write_page
from pipeline.card.words import title_of
from pipeline.config.config import Config
from pipeline.config.curation import Balance, Curate, Leaks, Mix, Retrieve
from pipeline.config.embedding import group_of
from pipeline.context import DESCRIPTOR, Context, packed_uri, result_line, source_of
from pipeline.curate.decide.shards import MARK
from pipeline.curate.sets import open_earlier, open_other_sets
from pipeline.errors import ConfigError, DataError, StorageError, TrainError
from pipeline.stages import chain, curate, evaluate, evaluation
from pipeline.stages.checks.places import with_absolute_weights
from pipeline.stages.checks.start import check_curated
from pipeline.storage.run_folder import RunFolder
from pipeline.train.checkpoint import state
from pipeline.uri import join, public

log = logging.getLogger("pipeline")
INSIDE = ("curate", "pretrain")  # what an earlier round does; pack comes before all of them
COMPARED = "rounds"  # the stage that scores all rounds, after the evaluation of the last
PAGE = "card.html"


def run(config: Config, stages: Sequence[str]) -> None:
    """Runs the named stages: of a recipe with several rounds all of them, or those of the last one
    where single stages are named.

    Raises:
        PipelineError: for whatever the user can mend.
        SystemExit: as `chain.run`.
    """
    if config.curate.rounds == 1 or config.curate.query:
        chain.run(config, stages)
        return
    config = with_absolute_weights(chain.named(config, stages))
    folder = RunFolder.of(config.run.folder, config.run.name)
    last = config_of(config, folder, config.curate.rounds)
    if chain.by_name(stages):
        _check_single(config, folder, stages)
        chain.run(last, stages)
        return
    check(config, folder)
    known = stages_of(config)
    chain.run(last, [name for name in known if name in (*stages, *_added(config))], known)


def stages_of(config: Config) -> dict[str, chain.Stage]:
    """The stages of a whole chain with those of its rounds, in their order."""
    known: dict[str, chain.Stage] = {}
    for name, stage in chain.STAGES.items():
        known[name] = stage
        if name == "pack":
            known |= {name_of(n): Round(config, n) for n in range(1, config.curate.rounds)}
        if name == "evaluate":
            known[COMPARED] = Comparison()
    return known


def _added(config: Config) -> list[str]:
    return [*map(name_of, range(1, config.curate.rounds)), COMPARED]


def name_of(number: int) -> str:
    """Of an earlier round: its stage and its folder."""
    return f"round-{number}"


def folder_of(folder: RunFolder, number: int) -> RunFolder:
    """The run folder of an earlier round."""
    name = name_of(number)
    return RunFolder(folder.path / name, str(join(folder.uri, name)) if folder.uri else "")


def config_of(config: Config, folder: RunFolder, number: int) -> Config:
    """The recipe of one round.

    Args:
        config: the recipe, with paths in full.
        folder: of the run.
        number: of the round, from 1.
    """
    curated: dict[str, Any] = {}
    sections: dict[str, Any] = {}
    if number > 1:
        before = str(folder_of(folder, number - 1).at())
        curated["embedder"] = before
        if config.curate.rounds_init == "previous":
            sections["model"] = config.model.model_copy(update={"init": before})
    elif not config.curate.embedder:
        without, others = _without_choice(config)
        curated |= without
        sections |= others
    if number < config.curate.rounds:  # a run of its own, of one round
        curated |= {"rounds": 1, "rounds_init": "recipe", "shards": ""}
        shards = packed_uri(config, folder)
        sections["data"] = config.data.model_copy(update={"shards": shards})
        name = f"{config.run.name}/{name_of(number)}"
        sections["run"] = config.run.model_copy(update={"name": name})
    sections["curate"] = config.curate.model_copy(update=curated)
    return config.model_copy(update=sections)


def _without_choice(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Changes of a recipe that nothing yet tells what an image shows for: of `curate`, and whole
    sections. Copies, junk and leaks go; nothing is retrieved or balanced.
    """
    sections: dict[str, Any] = {"retrieve": Retrieve(), "balance": Balance(), "mix": Mix()}
    if not (config.leaks.sets or config.evaluate.queries):  # what lvd142m says of them
        sections["leaks"] = Leaks()
    curated: dict[str, Any] = {"preset": "dedup"}
    if config.curate.copy_embedder == DESCRIPTOR:
        usual = Curate()
        curated |= {"image_size": usual.image_size, "batch_size": usual.batch_size}
    return curated, sections


def check(config: Config, folder: RunFolder) -> None:
    """All that can be known to be wrong with the rounds before a job starts.

    Raises:
        PipelineError: the first thing that is wrong.
    """
    rounds, shards = config.curate.rounds, config.data.shards
    source = source_of(shards) if shards and not config.data.source else ""
    if source.startswith(MARK):
        raise ConfigError(
            f"data.shards={public(shards)} holds what a curation kept, and each round chooses "
            "from the whole pile",
            f"name what that curation read: data.shards={source.removeprefix(MARK)}; or train on "
            "what it kept: curate.preset= and one round",
        )
    saved = state.latest(folder.checkpoints)
    trained = evaluation.trained_plan(saved).config.curate.rounds if saved else rounds
    if trained != rounds:
        raise TrainError(
            f"run {config.run.name} was trained with curate.rounds={trained}, and "
            f"curate.rounds={rounds} is asked for: its last round would start anew",
            "take another run.name=…, or the earlier number of rounds",
        )
    curate.embedders(config_of(config, folder, 1))
    seeds, _ = open_other_sets(config, packing=True)
    for number in range(1, rounds):
        used = [seed.uri for seed in seeds.values()]
        one = config_of(config, folder, number)
        check_curated(one, folder_of(folder, number), used, open_earlier(config))


def _check_single(config: Config, folder: RunFolder, stages: Sequence[str]) -> None:
    before = folder_of(folder, config.curate.rounds - 1)
    if not {"curate", "pretrain"} & set(stages) or state.latest(before.checkpoints) is not None:
        return
    raise ConfigError(
        f"with curate.rounds={config.curate.rounds}, {stages[-1]} alone is that of the last round, "
        f"and {before} has no checkpoint yet",
        "run all rounds with jobs/run.py, or this stage alone with curate.rounds=1",
    )


@dataclass(frozen=True)
class Round:
    """An earlier round as a stage of the chain.

    Attributes:
        recipe: with paths in full.
        number: from 1.
    """

    recipe: Config
    number: int

    def _context(self, context: Context) -> Context:
        """Its own config and folder; evaluation sets and those of the guard are the chain's, which
        has packed them.
        """
        config = config_of(self.recipe, context.folder, self.number)
        config = config.model_copy(
            update={"evaluate": context.config.evaluate, "guard": context.config.guard}
        )
        return Context(config, folder_of(context.folder, self.number), stages=chain.STAGES)

    def key(self, context: Context) -> str:
        """Changes with what is curated; what is trained on that is looked at by `intact`."""
        return curate.key(self._context(context))

    def intact(self, context: Context) -> bool:
        """Whether each of its stages is finished and there.

        Raises:
            TrainError: it was trained with settings that no longer are those of the recipe.
        """
        inside = self._context(context)
        try:
            return all(chain.finished(inside, name) for name in INSIDE)
        except StorageError:
            raise
        except DataError:  # its curated shards are gone
            return False

    def run(self, context: Context, tracker: Any) -> dict[str, Any]:
        """Curates and trains; what is finished is skipped."""
        name = name_of(self.number)
        result_line(
            name, f"of {self.recipe.curate.rounds}, in {folder_of(context.folder, self.number)}"
        )
        inside = self._context(context)
        inside.tracking = context.tracking.below(name)
        with inside.folder.locked():
            chain.write_config(inside.config, inside.folder)
            chain.go_through(inside, INSIDE)
        text = "; ".join(str(inside.results[stage]["text"]) for stage in INSIDE)
        tracker.note(text)
        return {"text": text, "images": inside.results["curate"]["images"]}


@dataclass(frozen=True)
class Comparison:
    """The backbones of all rounds, scored on the same images: those of the last evaluation."""

    def _context(self, context: Context) -> Context:
        config, folder = context.config, context.folder
        earlier = (folder_of(folder, n) for n in range(1, config.curate.rounds))
        chosen = [evaluation.chosen_in(one, config) for one in (*earlier, folder)]
        settings = config.evaluate
        decides = [group_of(settings.decide_by)] if settings.decide_by else []
        groups = tuple(dict.fromkeys(["knn", *decides, "unlabelled"]))
        update = {"models": tuple(str(one.path) for one in chosen), "scores": groups}
        changed = {"evaluate": settings.model_copy(update=update)}
        return Context(config.model_copy(update=changed), folder)

    def key(self, context: Context) -> str:
        """Changes with each network, the images and the settings of scores."""
        return evaluate.key(self._context(context))

    def intact(self, context: Context) -> bool:
        """Whether its card is still there."""
        return all((context.folder.stage(COMPARED) / file).is_file() for file in (CARD, PAGE))

    def run(self, context: Context, tracker: Any) -> dict[str, Any]:
        """Scores all rounds on the same images, on one card."""
        inside = self._context(context)
        request = _named_by_round(evaluation.request_of(inside))
        if remark := on_training_images(inside.config):
            log.warning("rounds      %s", remark)
            request = replace(request, remarks=(*request.remarks, remark))
        card = make_card(request)
        folder = context.folder.stage(COMPARED)
        write_card(card, folder)
        write_page(card, folder / PAGE, evaluate.image_of(request), request.networks[-1].spec.name)
        models = [one for one in card.contenders if one.role == "model"]
        scores = {
            one.name: one.results[card.score].interval
            for one in models
            if card.score in one.results
        }
        metrics = {
            f"rounds/{card.score}_{name.replace(' ', '_')}": one.value
            for name, one in scores.items()
        }
        tracker.metrics(0, metrics)
        said = ", ".join(f"{one.value:.4f} after {name}" for name, one in scores.items())
        compared = f"{title_of(card.score)} {said} ({evaluate.compared(card)}). " if said else ""
        text = compared + card.verdict.text
        result_line(COMPARED, text)
        tracker.note(text)
        for file in (PAGE, CARD):
            tracker.artifact(folder / file, COMPARED)
        return {"text": text, "scores": metrics, "page": f"{COMPARED}/{PAGE}"}


def on_training_images(config: Config) -> str:
    """Why a comparison of rounds favours the last one; "" where it does not."""
    if config.evaluate.reference or config.evaluate.queries:
        return ""
    return (
        "rounds are compared on the images that the last one chose and trained on, which favours "
        "it: name labelled images that no round trains on (evaluate.queries=…)"
    )


def _named_by_round(request: Request) -> Request:
    """Models are called `round 1`, `round 2`, and what each began as likewise."""
    models = [one.name for one in request.networks if one.role == "model"]
    names = {name: f"round {number}" for number, name in enumerate(models, 1)}
    networks = []
    for one in request.networks:
        name = names.get(one.name) or f"{names.get(one.of, one.of)}, {one.role}"
        networks.append(replace(one, name=name, of=names.get(one.of, one.of)))
    return replace(request, networks=tuple(networks), title="Rounds")
