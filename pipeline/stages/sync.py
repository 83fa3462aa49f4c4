"""Sends to MLflow what the journal of a run still holds, wherever the run folder is."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.storage.mirror import mirrored
from pipeline.storage.run_folder import RunFolder
from pipeline.track.journal import FILE_NAME
from pipeline.track.mlflow_writer import Unsent
from pipeline.track.sender import sync
from pipeline.track.state import FILE_NAME as STATE
from pipeline.track.state import forget_local
from pipeline.uri import is_uri, parent, public


def sync_run(place: str, again: bool = False) -> Unsent:
    """Sends the rest of a run's journal and returns what was sent.

    Args:
        place: the run folder, a path or a URI; of a URI the working copy is brought up to date
            first, and what the server has acknowledged is written back.
        again: from the beginning.

    Raises:
        PipelineError: as `track.sender.sync` says, or the folder cannot be read or written.
    """
    if not is_uri(place) or place.startswith("file://"):
        return sync(Path(place.removeprefix("file://")), again=again)
    folder = RunFolder.of(*map(str, parent(place)))
    with folder.locked(), mirrored(folder, lambda names: _fetched(folder, names)):
        if not (folder.path / FILE_NAME).exists():
            raise PipelineError(f"no {FILE_NAME} in {public(place)}", "give the folder of a run")
        return sync(folder.path, again=again)


def _fetched(folder: RunFolder, names: list[str]) -> None:
    if STATE in names:
        forget_local(folder.path)
