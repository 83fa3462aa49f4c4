"""Turns journal lines into MLflow calls. Client calls only: no active run, no global address."""

from __future__ import annotations

import json
import logging
import math
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.track import journal
from pipeline.track.client import explain, is_final, patient, quiet_mlflow
from pipeline.track.journal import Event, kind
from pipeline.track.names import (
    DIGEST_LIMIT,
    METRICS_PER_BATCH,
    PARAM_LIMIT,
    PARAMS_PER_BATCH,
    cut,
)
from pipeline.track.pages import charts, pictures
from pipeline.track.pages.zeros import Point, Zeros, points_of, voided
from pipeline.track.runs import Runs
from pipeline.track.server import artifact_folder
from pipeline.track.state import Known

log = logging.getLogger("pipeline.track")
FILES = ("picture", "artifact", "table", "model")


class Writer:
    """Applies journal lines to one server.

    Args:
        uri: address of the server.
        known: ids of the runs there; filled in.
        key: the run folder's mark, by which its runs are found again.
        folder: the run folder; file names in the journal are relative to it.
    """

    def __init__(self, uri: str, known: Known, key: str, folder: Path) -> None:
        quiet_mlflow()
        from mlflow import MlflowClient

        self.client, self.uri = MlflowClient(uri), uri
        self.known = known
        self.runs = Runs(self.client, known, key, artifact_folder(uri))
        self.folder = folder
        self._said: set[str] = set()
        self._checked = False

    def apply(self, events: Sequence[Event], end: int) -> None:
        """Applies lines in order: any number of metrics, or a single other one.

        What the server refuses for good is said once and left out.

        Args:
            events: the lines.
            end: offset in the journal after the last of them.

        Raises:
            Exception: the server did not take them now; the same call may be made again.
        """
        by_run: dict[str, list[Event]] = {}
        for event in events:
            if kind(event) in ("metrics", "system"):
                by_run.setdefault(event.get("to") or event["run"], []).append(event)
            else:
                self._try(event, self._other, event)
                if "resume" in event:
                    voided(self.known.zeros, self.folder / journal.FILE_NAME, event, end)
        held = {run: self.known.zeros.get(run, Zeros()).copy() for run in by_run}
        for run, rows in by_run.items():
            self._try(rows[0], self._metrics, run, points_of(held[run], rows))
        self.known.zeros |= held  # once the server has them all: a second try holds back the same

    def _try(self, event: Event, call: Callable[..., None], *arguments: Any) -> None:
        run = event.get("to") or event["run"]
        try:
            try:
                call(*arguments)
            except Exception as error:
                if kind(event) == "open" or not self.runs.again(run, error):
                    raise
                call(*arguments)
        except Exception as error:
            if not is_final(error):
                raise
            text = f"not sent to MLflow: {kind(event)} of {event['run']}: {explain(error)}"
            if kind(event) in FILES and (place := self._own_place(run)):
                text = (
                    "pictures, tables and models are not sent to MLflow: its server has no "
                    f"artifact proxy, so this machine would have to write them to {place}, "
                    f"and cannot ({explain(error)}); start the server with "
                    "--artifacts-destination and without --no-serve-artifacts"
                )
                self._say(text, "no place for files")
            else:
                self._say(text)

    def _say(self, text: str, about: str = "") -> None:
        if (about or text) not in self._said:
            self._said.add(about or text)
            log.warning("%s", text)

    def _own_place(self, run: str) -> str:
        """Where clients of this server write artifacts themselves; empty where it takes them."""
        if not self.uri.startswith("http"):
            return ""
        place = str(self.client.get_run(self.runs.id(run)).info.artifact_uri)
        return "" if place.startswith("mlflow-artifacts:") else place.rsplit("/", 2)[0]

    def _check_place(self, run: str) -> None:
        """Says where files would land on the disk of this machine, which the server cannot show."""
        if self._checked:
            return
        self._checked = True
        place, host = self._own_place(run), urlsplit(self.uri).hostname
        local = place.startswith(("/", "file:"))
        if local and host not in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
            self._say(
                f"the MLflow server at {self.uri} has no artifact proxy: pictures, tables and "
                f"models are written to {place} on this machine, and the server shows them only if "
                "that is on its disk too; start it with --artifacts-destination"
            )

    def _metrics(self, run: str, of_rows: list[Point]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(name, math.nan if value is None else value, ms, step)
            for name, value, ms, step in of_rows
        ]
        run_id = self.runs.id(run)
        for i in range(0, len(points), METRICS_PER_BATCH):
            batch = points[i : i + METRICS_PER_BATCH]
            self.client.log_batch(run_id, metrics=batch, synchronous=True)

    def _other(self, event: Event) -> None:
        name = kind(event)
        if name == "open":
            self.runs.open(event)
            self._view(event)
        elif (handler := getattr(self, f"_{name}", None)) is not None:
            with patient(name in FILES):
                handler(self.runs.id(event["run"]), event[name], event)
            if name in FILES:
                self._check_place(event["run"])

    def _view(self, event: Event) -> None:
        """The experiment's charts as the printed link opens them, and what the experiment is.

        Who may make runs may not always change an experiment: that is said once, and runs go on.
        """
        from mlflow.exceptions import MlflowException

        if event["open"].get("parent"):
            return
        try:
            self._set_view(event)
        except MlflowException as error:
            if error.error_code != "PERMISSION_DENIED" and not is_final(error):
                raise
            self._say(f"charts stand as MLflow arranges them, not in our order: {explain(error)}")

    def _set_view(self, event: Event) -> None:
        experiment = self.client.get_experiment(self.known.experiment_id)
        tags = {charts.TAG: charts.view(event["open"].get("score") or charts.SCORE)}
        if not experiment.tags.get("mlflow.note.content"):  # or what the user wrote
            tags["mlflow.note.content"] = charts.NOTE
        for name, value in tags.items():
            if experiment.tags.get(name) != value:
                self.client.set_experiment_tag(experiment.experiment_id, name, value)

    def _params(self, run_id: str, params: dict[str, str], _: Event) -> None:
        from mlflow.entities import Param

        params = {name: cut(value, PARAM_LIMIT) for name, value in params.items()}
        there = self.client.get_run(run_id).data.params
        new = [Param(name, value) for name, value in params.items() if name not in there]
        for i in range(0, len(new), PARAMS_PER_BATCH):
            self.client.log_batch(run_id, params=new[i : i + PARAMS_PER_BATCH])
        changed = [f"{k}: {there[k]} -> {v}" for k, v in params.items() if there.get(k, v) != v]
        if changed:  # MLflow refuses to change a param
            self.runs.tags(run_id, {"config.changed": "; ".join(changed)})

    def _tags(self, run_id: str, tags: dict[str, str], _: Event) -> None:
        self.runs.tags(run_id, tags)

    def _note(self, run_id: str, markdown: str, _: Event) -> None:
        self.runs.tags(run_id, {"mlflow.note.content": markdown})

    def _dataset(self, run_id: str, spec: dict[str, Any], _: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=cut(spec["name"], 500),
            digest=spec["digest"][:DIGEST_LIMIT],
            source_type="uri",
            source=json.dumps({"uri": spec["source"]}),
            profile=json.dumps({"images": spec["images"]}),
        )
        tags = [InputTag("mlflow.data.context", spec["context"])]
        tags.append(InputTag("images", str(spec["images"])))
        self.client.log_inputs(run_id, [DatasetInput(dataset, tags)])

    def _picture(self, run_id: str, spec: dict[str, Any], event: Event) -> None:
        shown = pictures.shown(self.folder / spec["file"], event["step"], spec.get("caption", ""))
        for key, (picture, step) in shown.items():
            self.client.log_image(
                run_id, picture, key=key or spec["key"], step=step, timestamp=event["ts"]
            )

    def _artifact(self, run_id: str, spec: dict[str, Any], _: Event) -> None:
        path = self.folder / spec["file"]
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), spec["folder"] or path.name)
        else:
            self.client.log_artifact(run_id, str(path), spec["folder"] or None)

    def _table(self, run_id: str, spec: dict[str, Any], _: Event) -> None:
        path = self.folder / spec["file"]
        self.client.log_artifact(run_id, str(path), "tables")
        # With this tag the page draws a table (MlflowClient.log_table does the same, with pandas).
        tag = "mlflow.loggedArtifacts"
        tables = json.loads(self.client.get_run(run_id).data.tags.get(tag, "[]"))
        if (entry := {"path": f"tables/{path.name}", "type": "table"}) not in tables:
            self.runs.tags(run_id, {tag: json.dumps([*tables, entry])})

    def _model(self, run_id: str, spec: dict[str, Any], _: Event) -> None:
        from mlflow.entities import LoggedModelOutput

        from pipeline.track.embedder import send_model

        model = send_model(self.client, run_id, self.folder / spec["folder"], spec)
        if above := spec.get("above"):
            self.client.log_outputs(self.runs.id(above), [LoggedModelOutput(model, step=0)])

    def _resume(self, run_id: str, step: int, event: Event) -> None:
        from mlflow.entities import Metric

        mark = Metric("data/attempt", float(event["attempt"]), event["ts"], step)
        self.client.log_batch(run_id, metrics=[mark], synchronous=True)
        self.runs.tags(run_id, {"attempt": event["attempt"]})

    def _end(self, run_id: str, status: str, event: Event) -> None:
        said = self.client.get_run(run_id).data.tags.get("status")
        if status != "FINISHED" or said in (None, "running"):  # not where it is `guarded`
            self.runs.tags(run_id, {"status": status.lower()})
        self.client.set_terminated(run_id, status, event["ts"])


# ---- What of the journal is to be sent, cut into calls.


@dataclass(frozen=True)
class Unsent:
    """What MLflow does not have yet."""

    metrics: int
    others: int

    def __bool__(self) -> bool:
        return self.metrics + self.others > 0

    def __str__(self) -> str:
        parts = [f"{self.metrics:,} metrics"] if self.metrics else []
        parts += [f"{self.others:,} other entries"] if self.others else []
        return " and ".join(parts) or "nothing"


def units(path: Path, start: int) -> Iterator[tuple[list[Event], int]]:
    """Cuts the journal after `start` into calls: (lines, offset after them).

    A call is up to 1,000 metrics, or one other line. Lines that stay here (`"send": false`, void)
    are passed over; the last unit may be empty and only move the offset.
    """
    marks = journal.voided(path, start)
    batch: list[Event] = []
    points, end, done = 0, start, start
    for line_end, event in journal.read(path, start):
        if event.get("send", True) and not journal.is_void(line_end, event, marks):
            size = len(event["metrics"]) if "metrics" in event else len(event.get("system", ()))
            if batch and (not size or points + size > METRICS_PER_BATCH):
                yield batch, end
                batch, points, done = [], 0, end
            batch.append(event)
            points += size
            if not size:
                yield batch, line_end
                batch, points, done = [], 0, line_end
        end = line_end
    if end > done:
        yield batch, end


def unsent(path: Path, start: int) -> Unsent:
    """Counts what the journal holds after `start` and would be sent."""
    events = [event for batch, _ in units(path, start) for event in batch]
    metrics = [event[kind(event)] for event in events if kind(event) in ("metrics", "system")]
    return Unsent(sum(map(len, metrics)), len(events) - len(metrics))


def in_doubt(path: Path, sent: int, begin: int) -> bool:
    """Whether rows that an earlier process left unsent may still be voided by a resume.

    They may while this process, whose journal begins at `begin`, has not said where their stage
    goes on (a resume), or that it does (a row), or that it does not (an end, another stage).
    """
    old = ((end, event) for end, event in journal.read(path, sent) if "metrics" in event)
    waiting = {event["run"] for end, event in old if end <= begin}
    for _, event in journal.read(path, begin) if waiting else ():
        if event["run"] in waiting and kind(event) in ("resume", "metrics", "end"):
            waiting.remove(event["run"])
        elif event["run"] not in (*waiting, "pipeline"):
            return False
    return bool(waiting)
