"""Runs stages in order, each in its own MLflow run under one pipeline run, and skips done ones."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from pipeline import environment
from pipeline.card.card import Verdict
from pipeline.config.config import Config
from pipeline.context import Context, with_packed_sets
from pipeline.driver import cluster
from pipeline.driver.mailbox import ENDING
from pipeline.driver.signals import ended_by_sigterm
from pipeline.errors import ConfigError
from pipeline.heartbeat import doing, now
from pipeline.run_report.facts import RunFacts
from pipeline.run_report.write import has_report, write_run_report
from pipeline.stages import (
    adapt,
    curate,
    embed,
    evaluate,
    evaluation,
    export,
    finetune,
    look,
    pack,
    pretrain,
    search,
)
from pipeline.stages.checks.known_sets import KnownSet
from pipeline.stages.checks.places import with_absolute_weights
from pipeline.stages.checks.start import check_start
from pipeline.stages.console.closing import say_verdict
from pipeline.stages.console.outlook import Outlook, looking_ahead
from pipeline.stages.tracked import pipeline_page
from pipeline.storage.mirror import mirrored
from pipeline.storage.once import forget, looked_up_once
from pipeline.storage.run_folder import RunFolder, atomic, fingerprint
from pipeline.track.driver import Pipeline, open_pipeline
from pipeline.track.endpoint import hide_credentials
from pipeline.track.settings import TrackSettings
from pipeline.track.state import FILE_NAME, forget_local
from pipeline.uri import public

log = logging.getLogger("pipeline")


class Stage(Protocol):
    """What each module of a stage has."""

    def key(self, context: Context) -> str:
        """Changes with all that the stage's result depends on."""

    def intact(self, context: Context) -> bool:
        """Whether what the finished stage wrote is still there."""

    def run(self, context: Context, tracker: Any) -> dict[str, Any]:
        """Does the work; the result is kept in `_done.json`, with a `text` for the report."""


STAGES: dict[str, Stage] = {
    "pack": pack,
    "curate": curate,
    "adapt": adapt,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "export": export,
    "finetune": finetune,
    "embed": embed,
    "search": search,
    "look": look,
}
ORDER = tuple(STAGES)
GUARDED = "guarded"  # status of a training that its guard has ended
USES = ("embed", "search", "look")  # in a whole chain only where their section is enabled
ALONE = ("finetune",)  # in no whole chain


def run(config: Config, stages: Sequence[str], known: Mapping[str, Stage] = STAGES) -> None:
    """Runs the named stages.

    Args:
        config: the recipe.
        stages: names, in order.
        known: all stages by name, in the order of the report; those of `pipeline.rounds` beside
            the usual ones.

    Raises:
        PipelineError: for whatever the user can mend.
        SystemExit: with 143 after a SIGTERM, 130 after a Ctrl-C, that ended in a checkpoint.
    """
    config = with_absolute_weights(named(config, stages))
    if config.curate.query:
        _look_up(config, stages)
        return
    if list(stages) == ["search"]:
        search.look_up(config)
        return
    if list(stages) == evaluation.JOB and config.evaluate.cards:
        evaluate.compare(config)
        return
    folder = RunFolder.of(config.run.folder, config.run.name)
    config, asked = adapt.begun(config, folder, stages)
    config, stages = evaluation.asked_for(config, folder, stages)
    with looked_up_once():
        sets = check_start(config, stages)
        with ended_by_sigterm(), folder.locked():
            log.info("run         %s in %s", config.run.name, folder)
            with mirrored(folder, lambda names: _fetched(folder, names)) as push:
                context = Context(config, folder, only=by_name(stages), stages=known, asked=asked)
                _run(context, stages, push, sets)


def _look_up(config: Config, stages: Sequence[str]) -> None:
    """Looks an image up instead of curating."""
    if list(stages) != ["curate"]:
        raise ConfigError(
            "curate.query looks up one image, but a whole chain was asked for",
            "use jobs/curate.py, or leave curate.query empty",
        )
    from pipeline.curate.query import look

    look(config)


def _run(
    context: Context,
    stages: Sequence[str],
    push: Callable[[], object],
    sets: Mapping[str, KnownSet],
) -> None:
    config, folder = context.config, context.folder
    if "pack" not in stages:  # what an earlier job packed
        context.config = with_packed_sets(config, folder)
    left = [name for name in stages if not _is_input(context, name)]
    # Finished stages are skipped, and wrong paths said, before Ray is started for the rest.
    while left and _skipped(context, left[0]):
        left.pop(0)
    if not left:
        if not has_report(context.folder, context.stages):  # a job was killed before it
            _write_report(context)
        say_verdict(context)
        return
    if "adapt" in context.results:  # it was finished before: what it derived is what is trained
        config = context.config
    written = write_config(config, folder)
    push()  # a remote run folder that cannot be written is said now
    hide_credentials()  # before there are workers, which get the environment
    with cluster.joined(config.resources), _open_pipeline(config, folder, written) as tracking:
        context.tracking = tracking
        with looking_ahead(context, left, sets) as outlook:
            go_through(context, left, push, outlook)
        _report(context)
    now("ending the job")
    say_verdict(context, tracking.page)


def go_through(
    context: Context,
    stages: Sequence[str],
    after: Callable[[], object] = lambda: None,
    outlook: Outlook | None = None,
) -> None:
    """Runs what is not finished of stages, in order, and calls `after` after each of them.

    Args:
        context: of the job.
        stages: names, in order.
        after: is called after each of them.
        outlook: is told when a stage begins and ends; the stages of a round have none.

    Raises:
        SystemExit: it was asked to end.
    """
    outlook = outlook or Outlook({})
    for name in stages:
        if _skipped(context, name):  # its key may be known only now
            outlook.skip(name)
        else:
            outlook.begin(name)
            _run_stage(context, name)
            outlook.end()
        if name == "adapt":
            write_config(context.config, context.folder)
        after()
        if ENDING.number and name != stages[-1]:  # it came after the last step
            log.info("stopped     after %s; the same command goes on from there", name)
            sys.exit(128 + ENDING.number)


def _is_input(context: Context, name: str) -> bool:
    """Whether a stage has nothing to do: its output is an input of the recipe, or a whole run is
    not asked for it.
    """
    if name == "adapt":
        return not context.config.adapt.enabled
    if name == "curate":
        return not context.config.curate.preset and not context.only
    if name in ALONE:
        return not context.only
    if name in USES:
        config = context.config
        enabled = {
            "embed": config.embed.enabled,
            "search": config.search.enabled,
            "look": config.look.enabled,
        }
        return not enabled[name] and not context.only
    if name != "pack" or context.config.data.source:
        return False
    return bool(context.config.data.shards) and not pack.sources(context)


def finished(context: Context, name: str) -> tuple[str, dict[str, Any]] | None:
    """Key and result of a stage that is finished and whose inputs have not changed since."""
    stage = context.stages[name]
    key = stage.key(context)
    result = context.folder.done(name, key)
    return None if result is None or not stage.intact(context) else (key, result)


def _skipped(context: Context, name: str) -> bool:
    """Skips a finished stage."""
    done = finished(context, name)
    if done is None:
        return False
    key, result = done
    log.info("%-11s up to date (%s), skipped", name, key[:4])
    if result.get("guard"):
        log.warning("%-11s %s", "guard", result["guard"])
    _hand_on(context, name, result)
    return True


def _run_stage(context: Context, name: str) -> None:
    stage = context.stages[name]
    key = stage.key(context)
    tracker = context.tracking.stage(name, tags={"stage": name, "config.hash": key})
    with doing(name):
        result = stage.run(context, tracker)
    if result.get("status") == GUARDED:
        tracker.tags({"status": GUARDED})
    if result.get("status") == "stopped":
        if result.get("lost_steps"):
            log.error("lost        what came after step %s: %s", result["step"], result["alarm"])
        log.info("stopped     at step %s; the same command goes on from there", result["step"])
        sys.exit(128 + (result["signal"] or signal.SIGTERM))
    context.folder.mark_done(name, key, result)
    _hand_on(context, name, result)
    context.tracking.end_stage(name)


def _hand_on(context: Context, name: str, result: dict[str, Any]) -> None:
    """Lets the stages that come next know of a finished one."""
    context.results[name] = result
    if name == "pack":
        forget()  # lists of millions of files
    context.config = with_packed_sets(context.config, context.folder)
    if name == "adapt":
        context.config = adapt.derived(context, result)


# ---- What is told: the config as it was run, MLflow's pipeline run, the report of the run.


def write_config(config: Config, folder: RunFolder) -> Path:
    """Writes `config.yaml` of a run folder."""
    path = folder.path / "config.yaml"
    with atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return path


def _open_pipeline(config: Config, folder: RunFolder, written: Path) -> Pipeline:
    settings = TrackSettings(
        run_folder=str(folder.path),
        stage="pipeline",
        shown=str(folder) if folder.uri else "",
        experiment=config.track.experiment or config.run.name,
        uri=config.track.uri if config.track.enabled else "none",
        score=f"eval/{config.evaluate.decide_by or f'knn{config.evaluate.k}_top1'}",
    )
    return open_pipeline(
        settings,
        config.run.name,
        # reports for a remote run folder are all sent from here
        nodes=1 if folder.uri else cluster.nodes(),
        config=written,
        tags=_origin(config),
    )


def _origin(config: Config) -> dict[str, str]:
    """Tags that say what runs, and which submitted job it is, by its id and its metadata."""
    tags = {"config.hash": fingerprint(config.model_dump())}
    return {**environment.submission(), **tags, **pipeline_page.tags_of(config)}


def _fetched(folder: RunFolder, names: Sequence[str]) -> None:
    if FILE_NAME in names:
        forget_local(folder.path)


def _write_report(context: Context) -> tuple[Path, RunFacts]:
    """Writes `report.html` of the run folder; gives its path and what it was made of."""
    known = {name: context.folder.last(name) for name in context.stages} | context.results
    comparison = adapt.before_and_after(context, known)
    shown = comparison and comparison.rows and (comparison.table, comparison.note)
    facts = RunFacts.of(context.config, context.folder, known, *(shown or ()))
    return write_run_report(facts), facts


def _report(context: Context) -> None:
    """`report.html`, and the results on the page of the pipeline run."""
    report, facts = _write_report(context)
    if context.only:  # a whole run says it at its end
        log.info("report      %s", public(context.folder.at(report.name)))
    tracker = context.tracking.tracker
    tracker.artifact(report)
    lines = {name: str(one["text"]) for name, one in facts.results.items() if "text" in one}
    evaluated = facts.result("evaluate")
    said = Verdict(str(evaluated.get("rule", "")), str(evaluated.get("verdict", "")))
    tracker.note(pipeline_page.note(facts.card, lines, said))
    tracker.recipe(pipeline_page.changed_fields(context.config))
    if facts.result("pretrain").get("status") == GUARDED:  # now, or in an earlier start
        tracker.tags({"status": GUARDED})


# ---- The config as stages get it.


def named(config: Config, stages: Sequence[str]) -> Config:
    """The config with a run name; a run without recipe and name is called after its stage."""
    if config.run.name:
        return config
    name = stages[-1] if by_name(stages) else "run"
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def by_name(stages: Sequence[str]) -> bool:
    """Whether single stages were asked for, not the whole chain."""
    return "pretrain" not in stages or len(stages) == 1
