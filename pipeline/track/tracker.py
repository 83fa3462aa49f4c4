"""What a stage reports with: metrics, pictures, tables, files. Written down first, sent later."""

from __future__ import annotations

import functools
import io
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, cast

from pipeline.track import journal
from pipeline.track.names import MAX_PARAMS, PARAM_LIMIT, TAG_LIMIT, cut, metric_name, picture_key
from pipeline.track.sender import Sender
from pipeline.track.settings import TrackSettings
from pipeline.track.state import atomic_write
from pipeline.track.system import SystemMetrics
from pipeline.uri import public

# ---- Keeps what is reported from ending a run.


log = logging.getLogger("pipeline.track")

P = ParamSpec("P")


def harmless(method: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """No report may end a training run: a failure becomes a warning."""

    @functools.wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            log.warning("tracking: %s failed: %s: %s", method.__name__, type(error).__name__, error)

    return cast(Callable[Concatenate[Any, P], None], call)


def plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python ones, everything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


TABLE_ROWS = 500

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class ModelCard:
    """What MLflow is told of exported weights, and which images they take.

    Attributes:
        name: registered model; empty: log it, do not register.
        score: k-NN accuracy; alias `best` moves to this version if it is the highest.
        note: description of the version.
        image_size: side of the crop; 0: the backbone's.
        mean: per channel, of values in 0 to 1; default: ImageNet's.
        std: likewise.
        value_range: of images of more than 8 bits, that becomes 0 to 255.
        metrics: by name, for the model's page.
        params: likewise.
        page: what the model's page says, markdown; `MODEL_URI` stands for its address.
        tags: to find it by.
        data: name and digest of the images that the metrics are of.
    """

    name: str = ""
    score: float | None = None
    note: str = ""
    image_size: int = 0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    value_range: Any = "full"
    metrics: Mapping[str, float] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    page: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    data: tuple[str, str] = ("", "")


class Tracker:
    """Reports to one run. Every method returns at once and none raises.

    Args:
        settings: see TrackSettings.
        sender: the sender to share; made (and closed) here if not given.
    """

    def __init__(self, settings: TrackSettings, sender: Sender | None = None) -> None:
        self.settings = settings
        settings.set_aside()
        self.folder = Path(settings.run_folder)
        self.stage = settings.stage
        self.journal = journal.Journal(self.folder / journal.FILE_NAME)
        self._own = settings.sender() if sender is None else None
        if self._own:
            self._own.start()
        self._system = (
            SystemMetrics(self._write, self._began_ms) if settings.system_metrics else None
        )

    @property
    def run_id(self) -> str:
        """The MLflow id of this run, or "" where the server has not given it yet."""
        known = self._own.known.runs if self._own else {}
        return self.settings.run_id or known.get(self.stage, "")

    @harmless
    def resume(self, step: int) -> None:
        """Says that the stage starts at `step`: rows from there on that were not sent are void."""
        self.journal.resume(self.stage, step)

    @harmless
    def metrics(self, step: int, values: Mapping[str, Any], send: bool = True) -> None:
        """Writes metrics of a step; `send=False` keeps them in the journal."""
        self.journal.metrics(self.stage, step, values, send)

    @harmless
    def headline(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows metrics on the run above as well, as a rule that of the pipeline, whose page is the
        one that people open.
        """
        self.journal.metrics(self.stage, step, values, to=self.settings.above)

    @harmless
    def params(self, values: Mapping[str, Any]) -> None:
        """Sets up to 8 short params; more would push the pictures off the page."""
        if len(values) > MAX_PARAMS:
            log.warning("only %d params are sent; the rest is in plan.yaml", MAX_PARAMS)
        kept = list(values.items())[:MAX_PARAMS]
        self._write(params={metric_name(k): cut(public(str(v)), PARAM_LIMIT) for k, v in kept})

    @harmless
    def recipe(self, values: Mapping[str, Any]) -> None:
        """Sets what a recipe changes, as params `yaml/<field>`, which stand behind the short ones.

        For the pipeline's run, whose pictures are in its report: two of them are compared by it.
        """
        self._write(
            params={f"yaml/{k}": cut(public(str(v)), PARAM_LIMIT) for k, v in values.items()}
        )

    @harmless
    def tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags."""
        self._write(tags={metric_name(k): cut(str(v), TAG_LIMIT) for k, v in values.items()})

    @harmless
    def note(self, markdown: str) -> None:
        """Sets the run's description; the page shows its first line, so begin with the result."""
        self._write(note=cut(markdown, TAG_LIMIT))

    @harmless
    def dataset(
        self, name: str, digest: str, source: str, context: str = "training", images: int = 0
    ) -> None:
        """Names a data set that the run read; the digest is cut to 36 characters."""
        spec = {"name": name, "digest": digest, "source": source}
        self._write(dataset={**spec, "context": context, "images": images})

    @harmless
    def picture(self, key: str, step: int, pixels: Any, caption: str = "") -> None:
        """Keeps a picture, uint8 [H,W,3], as PNG and shows it at `pictures/<key>` and `step`.

        MLflow shows it with its step and the caption above, and from the second step on beside the
        first one, at `first and last step/<key>`.
        """
        from PIL import Image

        key = picture_key(key)
        file = f"pictures/{self.stage}/{key.removeprefix('pictures/')}-{step:08d}.png"
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG", compress_level=1)
        atomic_write(self.folder / file, data.getvalue())
        self._write(step=int(step), picture={"key": key, "file": file, "caption": caption})

    @harmless
    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Keeps a table, up to 500 rows, as `tables/<name>.json` and shows it."""
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        if len(rows) > TABLE_ROWS:
            log.warning("table %s: the first %d of %d rows are kept", name, TABLE_ROWS, len(rows))
        name = metric_name(name).replace("/", "-").replace(":", "-")
        file = f"tables/{self.stage}/{name}.json"
        data = {"columns": list(columns), "data": rows[:TABLE_ROWS]}
        atomic_write(self.folder / file, json.dumps(data, default=plain).encode())
        self._write(table={"name": name, "file": file})

    @harmless
    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Sends a file or a folder; one outside the run folder is copied into it first."""
        self._write(artifact={"file": self._spooled(Path(path)), "folder": folder})

    @harmless
    def model(self, weights: str | Path, card: ModelCard) -> None:
        """Logs exported weights as an MLflow model, see embedder.py.

        Args:
            weights: folder with safetensors and config.json.
            card: what is known of them.
        """
        model = {"folder": self._spooled(Path(weights)), "above": self.settings.above}
        self._write(model=model | asdict(card))

    @harmless
    def line(self, event: Mapping[str, Any]) -> None:
        """Writes a journal line that another process of this stage made."""
        self._write(**event)

    @harmless
    def flush(self, timeout: float) -> None:
        """Waits until what was reported outlives this process: it is written down at once here."""

    def close(self, status: Status | None = None, timeout: float = 60.0) -> None:
        """Sends what is left. The driver also gives the run's status; a worker does not."""
        if self._system:
            self._system.close()
        if status:
            self._write(end=status)
        if self._own:
            self._own.close(timeout)
        self.journal.close()

    def _write(self, **event: Any) -> None:
        self.journal.append(self.stage, **event)

    def _began_ms(self) -> int:
        """When the stage wrote its first line, perhaps in an earlier job."""
        lines = journal.read(self.journal.path)
        return next((e["ts"] for _, e in lines if e["run"] == self.stage), journal.now_ms())

    def _spooled(self, path: Path) -> str:
        path, folder = path.absolute(), self.folder.absolute()
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
        copy = folder / "artifacts" / self.stage / path.name
        if path.is_dir():
            shutil.copytree(path, copy, dirs_exist_ok=True)
        else:
            atomic_write(copy, path.read_bytes())
        return str(copy.relative_to(folder))


class NullTracker:
    """Takes every report and does nothing; for the workers that are not rank 0."""

    run_id = ""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not callable(getattr(Tracker, name, None)) or name.startswith("_"):
            raise AttributeError(name)
        return lambda *_, **__: None


def tracker_from(settings: TrackSettings | None, rank: int = 0) -> Tracker | NullTracker:
    """The tracker of a worker: a real one on rank 0, else (or without settings) a silent one."""
    return Tracker(settings) if settings and rank == 0 else NullTracker()


# ---- A tracker on another node than the run folder: its reports are made by the driver's
# tracker.


class Sending(Protocol):
    """How reports travel; see `pipeline.driver.mailbox.Reports`."""

    def send(self, method: str, *arguments: Any, **options: Any) -> None:
        """Hands a call on."""

    def wait(self, timeout: float) -> None:
        """Waits until the calls have arrived."""


class RemoteTracker:
    """Has the reporting methods of `Tracker`; each call is made on the driver's one."""

    def __init__(self, settings: TrackSettings, sending: Sending) -> None:
        self.run_id = settings.run_id
        self._sending = sending
        # No earlier lines are known here, so the seconds of the machine count from now.
        self._system = (
            SystemMetrics(self._send_line, journal.now_ms) if settings.system_metrics else None
        )

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_") or not callable(getattr(Tracker, name, None)):
            raise AttributeError(name)

        def report(*arguments: Any, **options: Any) -> None:
            self._sending.send(name, *arguments, **options)

        return report

    def _send_line(self, **event: Any) -> None:
        self._sending.send("line", event)

    def flush(self, timeout: float) -> None:
        """Waits until the reports so far are with the driver, for at most `timeout` seconds."""
        self._sending.wait(timeout)

    def close(self, timeout: float = 60.0) -> None:
        """Waits until all reports have arrived. The run itself is the driver's to end."""
        if self._system:
            self._system.close()
        self._sending.wait(timeout)
