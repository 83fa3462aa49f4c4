"""The driver's side: one MLflow run for the pipeline, a child run for each stage."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.environment import name_user
from pipeline.heartbeat import doing
from pipeline.track.endpoint import JOURNAL_ONLY, LOCAL, Database, LocalServer, Remote, links
from pipeline.track.journal import FILE_NAME, Journal
from pipeline.track.names import TAG_LIMIT, cut
from pipeline.track.sender import Sender
from pipeline.track.settings import PIPELINE, TrackSettings
from pipeline.track.tracker import NullTracker, Status, Tracker
from pipeline.uri import public

log = logging.getLogger("pipeline.track")


class Pipeline:
    """The runs of one run folder, open. Use it with `with`: the runs end with the right status.

    Attributes:
        tracker: reports to the pipeline run.
    """

    def __init__(self, settings: TrackSettings, sender: Sender | None, name: str) -> None:
        self.settings, self._sender, self._name = settings, sender, name
        self._stages: dict[str, Tracker] = {}
        self._journal = Journal(Path(settings.run_folder) / FILE_NAME)
        self.tracker = Tracker(replace(settings, stage=PIPELINE, system_metrics=False), sender)

    def stage(
        self,
        stage: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        system_metrics: bool = False,
        above: str = PIPELINE,
    ) -> Tracker:
        """Opens a stage's run, or opens it again, and returns the driver's tracker for it."""
        self.open(stage, stage.rpartition("/")[2], tags, parent=above)
        changed: dict[str, Any] = {"stage": stage, "above": above, "system_metrics": system_metrics}
        settings = replace(self.settings, **changed)
        tracker = self._stages[stage] = Tracker(settings, self._sender)
        if params:
            tracker.params(params)
        return tracker

    def below(self, stage: str) -> Part:
        """What a stage that consists of stages reports their runs to."""
        return Part(self, stage)

    def worker_settings(
        self, stage: str, system_metrics: bool = False, above: str = PIPELINE
    ) -> TrackSettings:
        """The settings for the worker that reports for a stage; they can be pickled."""
        changed: dict[str, Any] = {"stage": stage, "above": above, "system_metrics": system_metrics}
        settings = replace(self.settings, **changed)
        ids = self.ids
        return replace(settings, pipeline_run_id=ids.get(PIPELINE, ""), run_id=ids.get(stage, ""))

    @property
    def ids(self) -> dict[str, str]:
        """MLflow run ids by stage, as far as the server has given them."""
        return dict(self._sender.known.runs) if self._sender else {}

    @property
    def page(self) -> str:
        """Address of the pipeline run; "" while the server has not given it one."""
        known = self._sender.known if self._sender else None
        if known is None:
            return ""
        experiment = self.settings.experiment
        lines = links(known.uri, experiment, known.experiment_id, self.ids.get(PIPELINE, ""))
        return next((x.partition(" ")[2].strip() for x in lines if x.startswith("run ")), "")

    def open(
        self, run: str, title: str, tags: Mapping[str, Any] | None = None, parent: str = ""
    ) -> None:
        """Writes the line that makes a run, or continues it."""
        spec = {"name": title, "pipeline": self._name, "experiment": self.settings.experiment}
        spec |= {"score": self.settings.score} if self.settings.score else {}
        if parent:
            spec["parent"] = parent
        kept = {k: cut(str(v), TAG_LIMIT) for k, v in {**_origin(), **(tags or {})}.items()}
        attempt = self._journal.attempt(run)
        self._journal.append(run, open={**spec, "tags": kept}, attempt=attempt)

    def end_stage(self, stage: str, status: Status = "FINISHED") -> None:
        """Ends a stage's run; for a chain of stages, where the pipeline goes on."""
        self._stages.pop(stage).close(status)

    def close(self, status: Status = "FINISHED", timeout: float = 60.0) -> None:
        """Ends the runs that are still open, and waits up to `timeout` s until all is sent."""
        for stage in list(self._stages):
            self.end_stage(stage, status)
        self.tracker.close(status)
        self._journal.close()
        if self._sender:
            with doing("sending the rest to MLflow"):
                self._sender.close(timeout)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)  # Ctrl-C, SystemExit
        self.close("KILLED" if stopped else "FAILED" if kind else "FINISHED")


class Part:
    """The runs of the stages that one stage consists of, below its own run: `round-1/pretrain`."""

    def __init__(self, pipeline: Pipeline, above: str) -> None:
        self._pipeline, self._above = pipeline, above
        self.tracker = NullTracker()  # the page of the pipeline is that of its own stages

    def stage(self, stage: str, tags: Mapping[str, Any] | None = None) -> Tracker:
        """As `Pipeline.stage`."""
        return self._pipeline.stage(f"{self._above}/{stage}", tags=tags, above=self._above)

    def worker_settings(self, stage: str, system_metrics: bool = False) -> TrackSettings:
        """As `Pipeline.worker_settings`."""
        whole = f"{self._above}/{stage}"
        return self._pipeline.worker_settings(whole, system_metrics, self._above)

    def end_stage(self, stage: str) -> None:
        """As `Pipeline.end_stage`."""
        self._pipeline.end_stage(f"{self._above}/{stage}")


def open_pipeline(
    settings: TrackSettings,
    name: str,
    *,
    nodes: int = 1,
    tags: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    wait: float = 30.0,
) -> Pipeline:
    """Opens the pipeline run of a run folder, or continues it.

    Never fails for the server's sake: without one the run folder keeps everything. A server that
    is given is waited for; one that is started here is not, its runs are made when it answers.

    Args:
        settings: run folder, experiment and server; `stage` is not used.
        name: name of the run.
        nodes: nodes of the Ray cluster; with several of them no local server is started.
        tags: further tags, e.g. recipe and config.hash.
        config: file with the full config, sent as an artifact.
        wait: seconds to wait for a server that is given.

    Raises:
        PipelineError: the address is not one of a server.
    """
    settings = replace(settings, run_folder=str(Path(settings.run_folder).absolute()))
    Path(settings.run_folder).mkdir(parents=True, exist_ok=True)
    sender = settings.sender(nodes)
    if sender is None:
        settings = replace(settings, uri=JOURNAL_ONLY)
    else:
        where = sender.endpoint
        # a database is on this machine, perhaps not on that of a worker: all is sent from here
        uri = JOURNAL_ONLY if isinstance(where, Database) else where.id
        uri = LOCAL if isinstance(where, LocalServer) else uri
        settings = replace(settings, uri=uri, key=sender.state.key)
    pipeline = Pipeline(settings, sender, name)
    pipeline.open(PIPELINE, name, tags)
    if config:
        pipeline.tracker.artifact(config)
    if sender is not None:
        sender.start()
        if isinstance(sender.endpoint, Remote):
            with doing("waiting for the MLflow server"):
                sender.wait_for(PIPELINE, wait)
    return pipeline


def _origin() -> dict[str, str]:
    """Tags that say where the run comes from; those of MLflow fill its field `Source`."""
    name_user()
    root = Path(__file__).parents[2]
    script = Path(sys.argv[0] or "python")
    inside = script.absolute().is_relative_to(root)
    name = str(script.absolute().relative_to(root)) if inside else script.name
    tags = {
        "ray.job_id": os.environ.get("RAY_JOB_ID", ""),
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": name,
        "mlflow.source.type": "LOCAL",
        "mlflow.project.entryPoint": script.stem,
        "command": public(shlex.join([name, *map(public, sys.argv[1:])])),
    }
    if (root / ".git").exists():  # not in a Ray working directory, nor once installed
        command = ["git", "-C", str(root), "rev-parse", "--verify", "HEAD"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            tags["git.commit"] = tags["mlflow.source.git.commit"] = commit.stdout.strip()
    return {name: value for name, value in tags.items() if value}
