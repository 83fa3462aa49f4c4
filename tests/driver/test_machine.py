"""A cluster in words."""

from __future__ import annotations

import pytest

from pipeline.driver.machine import words_of


@pytest.mark.parametrize(
    "resources, nodes, said",
    [
        ({"CPU": 1.0, "memory": 9e9, "node:10.0.0.1": 1.0}, 1, "1 CPU core"),
        (
            {"CPU": 192.0, "GPU": 16.0, "accelerator_type:H100": 2.0},
            2,
            "16 × H100, 192 CPU cores, 2 nodes",
        ),
        ({"CPU": 8.0, "GPU": 1.0}, 1, "1 × GPU, 8 CPU cores"),
    ],
)
def test_words(resources: dict[str, float], nodes: int, said: str) -> None:
    assert words_of(resources, nodes) == said
