"""What is looked up once for one start of a job: lists of sources, footers of their tables.

A job's checks, the key of its pack and the pack itself ask for the same list, which takes minutes
for millions of files. They get one, so that they also agree about what is there. Outside of
`looked_up_once` everything is looked up anew, and so is it in the next job of a process.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
_KNOWN: ContextVar[dict[Hashable, Any] | None] = ContextVar("known", default=None)


@contextmanager
def looked_up_once() -> Iterator[None]:
    """Inside, `once` remembers."""
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def once(key: Hashable, look_up: Callable[[], T]) -> T:
    """What `look_up` gives, or gave before under this key. Errors are not remembered."""
    known = _KNOWN.get()
    if known is None:
        return look_up()
    if key not in known:
        known[key] = look_up()
    return known[key]  # type: ignore[no-any-return]


def forget() -> None:
    """Frees what is remembered: what comes now looks anew."""
    known = _KNOWN.get()
    if known is not None:
        known.clear()
