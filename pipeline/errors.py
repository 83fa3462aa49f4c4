"""The errors a user can cause: one sentence each, with what to do about it."""

from __future__ import annotations

from typing import Any

from pipeline.uri import public


class PipelineError(Exception):
    """A mistake in the input, the config or the surroundings, not a bug.

    `what` says what was found and what was expected, `hint` what to do. `jobs/*` print both on
    stderr and exit with 2; a traceback is shown only with `PIPELINE_DEBUG=1`. Keys in URIs are left
    out of both.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        what, hint = public(what), public(hint)
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n  {self.hint}" if self.hint else self.what


class ConfigError(PipelineError):
    """The recipe or an override is wrong; `what` lists every error found, one a line."""


class PlacementError(ConfigError):
    """The cluster has no room for the plan; nodes that come may change that.

    `bundles` are the resources that it needs, each of them on one node, in Ray's names.
    """

    def __init__(
        self, what: str, hint: str = "", bundles: list[dict[str, float]] | None = None
    ) -> None:
        super().__init__(what, hint)
        self.bundles = bundles or []

    def __reduce__(self) -> tuple[type[PlacementError], tuple[Any, ...]]:
        return type(self), (self.what, self.hint, self.bundles)


class DataError(PipelineError):
    """Images, shards or tables are not what a stage can use."""


class StorageError(DataError, OSError):
    """Remote storage failed for good, or refused. Also an `OSError`: who can go on without, does.

    `passing` says that another try later may help: nothing is wrong with what was asked for.
    """

    def __init__(self, what: str, hint: str = "", passing: bool = False) -> None:
        super().__init__(what, hint)
        self.passing = passing

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, str, bool]]:
        return type(self), (self.what, self.hint, self.passing)


class TrainError(PipelineError):
    """Training stopped for a reason that the user must know (non-finite loss, changed plan)."""


class DamagedError(TrainError):
    """A checkpoint holds other bytes than were written, or code."""


class StoppedError(PipelineError):
    """Training was asked to stop while no workers were there to write a checkpoint."""


# Ray ends these with a paragraph of tips; what they say, in its words and in ours.
_NO_ROOM = {
    "local disk's utilization is over capacity": "a node's object store is full and so is the disk "
    "that it spills to; free that disk, or start nodes with a larger --object-store-memory or with "
    "--object-spilling-directory on another disk",
    "object store is full of objects that are still in": "a node's object store is full of objects "
    "in use; start nodes with a larger --object-store-memory",
}


def shortened(text: str, most: int = 200) -> str:
    """A text as a sentence or a table may hold it; an ellipsis says that something is left out."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def last_line(error: BaseException | str) -> str:
    """The last line of an error or a text: with Ray's errors, the one that says what happened."""
    text = public(str(error))
    for words, sentence in _NO_ROOM.items():
        if words in text:
            return sentence
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def one_line(error: BaseException) -> str:
    """An error in one line, for a log that goes on: without what to do about it."""
    what = error.what if isinstance(error, PipelineError) else public(str(error))
    return " ".join(what.split())
