"""Keeps what is reported from ending a run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, cast

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
