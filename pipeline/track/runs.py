"""Finds or makes the MLflow runs of a run folder: one for the pipeline, a child for each stage."""

from __future__ import annotations

import logging
from typing import Any

from pipeline.track.client import NotReadyError
from pipeline.track.journal import Event
from pipeline.track.names import TAG_LIMIT, TAGS_PER_BATCH, cut
from pipeline.track.state import Known

log = logging.getLogger("pipeline.track")


class Runs:
    """The runs of one folder on one server, by stage.

    A run is known by its id, or is found by our own tags (`pipeline.key` marks the folder), so that
    an answer that got lost, or another machine, does not make a second one.
    """

    def __init__(self, client: Any, known: Known, key: str, artifacts: str | None = None) -> None:
        self.client, self.known, self.key = client, known, key
        self.artifacts = artifacts  # place of new experiments' files; None: the server's choice
        self._told = False
        self._opened: dict[str, Event] = {}

    def id(self, run: str) -> str:
        """The id of a run that was opened, here or by another process with the same key."""
        if run not in self.known.runs:
            run_id = self._find({"pipeline.key": self.key, "pipeline.stage": run})
            if run_id is None:
                raise NotReadyError(f"run {run} is not created yet")
            self.known.runs[run] = run_id
        return self.known.runs[run]

    def open(self, event: Event) -> None:
        """Makes the run of an `open` line, or continues it, and sets its tags."""
        from mlflow.exceptions import MlflowException

        run, spec = event["run"], event["open"]
        self._opened[run] = event
        self.known.experiment_id = self._experiment(spec["experiment"])
        if run in self.known.runs:
            try:
                if self._is_deleted(self.known.runs[run]):
                    self._forget(run, spec["pipeline"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._forget(run, spec["pipeline"])  # for good, or with the whole database
        if run not in self.known.runs:
            run_id = self._find({"pipeline.key": self.key, "pipeline.stage": run})
            if run_id is not None:
                self.known.runs[run] = run_id
        tags = {"pipeline.name": spec["pipeline"], "pipeline.stage": run}
        tags |= {"pipeline.key": self.key, "stage": run, "attempt": str(event["attempt"])}
        tags |= {"status": "running"}
        tags |= spec.get("tags", {})
        if parent := spec.get("parent"):  # which may be another one than before
            tags["mlflow.parentRunId"] = self.id(parent)
        if run in self.known.runs:
            self.client.update_run(self.known.runs[run], status="RUNNING")
        else:
            created = self.client.create_run(
                self.known.experiment_id, start_time=event["ts"], run_name=spec["name"], tags=tags
            )
            self.known.runs[run] = created.info.run_id
        self.tags(self.known.runs[run], tags)

    def again(self, run: str, error: Exception) -> bool:
        """Makes a run anew if it was deleted meanwhile, which is what the server complains of."""
        if "'active' state" not in str(error) or run not in self._opened:
            return False
        self.open(self._opened[run])
        return True

    def _is_deleted(self, run_id: str) -> bool:
        """Whether somebody deleted a run, or its experiment, in the UI."""
        info = self.client.get_run(run_id).info
        if info.lifecycle_stage == "deleted" or info.experiment_id == self.known.experiment_id:
            return bool(info.lifecycle_stage == "deleted")
        return bool(self.client.get_experiment(info.experiment_id).lifecycle_stage == "deleted")

    def _forget(self, run: str, pipeline: str) -> None:
        self._say_deleted(pipeline)
        del self.known.runs[run]
        self.known.zeros.pop(run, None)  # its curves begin anew

    def _say_deleted(self, pipeline: str) -> None:
        if not self._told:
            log.warning(
                "the MLflow run of %s was deleted on the server: a new one is made, with what "
                "comes from here on; `jobs/sync.py --again` sends what was before",
                pipeline,
            )
        self._told = True

    def _experiment(self, name: str) -> str:
        """The id of an experiment, made if need be; of one that was deleted, of its successor."""
        from mlflow.exceptions import MlflowException

        candidate, number = name, 1
        while True:
            experiment = self.client.get_experiment_by_name(candidate)
            if experiment is None:
                try:
                    new = str(self.client.create_experiment(candidate, self.artifacts))
                except MlflowException:  # somebody else was faster
                    experiment = self.client.get_experiment_by_name(candidate)
                    if experiment is None:
                        raise
                else:
                    if number > 1:
                        log.warning(
                            "the MLflow experiment %s was deleted on the server: the runs go into "
                            "a new one, %s, with what comes from here on",
                            name,
                            candidate,
                        )
                        self._told = True
                    return new
            if experiment.lifecycle_stage != "deleted":
                return str(experiment.experiment_id)
            number += 1  # MLflow keeps the name of a deleted one
            candidate = f"{name}-{number}"

    def _find(self, tags: dict[str, str]) -> str | None:
        if not self.known.experiment_id:
            experiments = [e.experiment_id for e in self.client.search_experiments()]
        else:
            experiments = [self.known.experiment_id]
        where = " and ".join(f"tags.`{name}` = '{_quote(value)}'" for name, value in tags.items())
        runs = self.client.search_runs(
            experiments, where, max_results=1, order_by=["attributes.start_time DESC"]
        )
        return str(runs[0].info.run_id) if runs else None

    def tags(self, run_id: str, tags: dict[str, Any]) -> None:
        """Sets tags, each cut to what MLflow takes."""
        from mlflow.entities import RunTag

        rows = [RunTag(name, cut(str(value), TAG_LIMIT)) for name, value in tags.items()]
        for i in range(0, len(rows), TAGS_PER_BATCH):
            self.client.log_batch(run_id, tags=rows[i : i + TAGS_PER_BATCH])


def _quote(value: str) -> str:
    return value.replace("'", "")
