"""Sets of planted truth, and tasks that run in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import standins
from tests.data import encoded

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of an evaluation run in this process."""
    standins.ray_here(monkeypatch)


def coloured(name: str, number: int, side: int = 18) -> bytes:
    """A picture of a class's colour with grain, another one for each number."""
    rng = np.random.default_rng([number, *COLOURS[name]])
    pixels = rng.integers(-20, 20, (side, side, 3)) + COLOURS[name]
    return encoded(np.clip(pixels, 0, 255).astype(np.uint8))


def folder_of_classes(folder: Path, each: int, first: int = 0) -> Path:
    """A folder for each colour with so many images."""
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for number in range(first, first + each):
            (folder / name / f"{number}.png").write_bytes(coloured(name, number))
    return folder
