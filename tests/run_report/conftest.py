"""A browser that looks at reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.browser import chromium


@pytest.fixture(scope="module")  # it holds this thread's event loop: one at a time
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started
