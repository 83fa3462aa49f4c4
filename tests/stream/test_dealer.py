"""What a dealer counts, with a data set that is a stand-in: no Ray runs here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.data import DataContext

from pipeline.stream import dealer as module
from pipeline.stream.dealer import Dealer, DecodeTasks, RunSteps, StreamPart
from pipeline.stream.dealing import Dealing
from pipeline.stream.order import ReadingOrder
from pipeline.stream.reader import Reading

BATCH, READ_STEPS = 8, module.READ_WINDOWS  # a window of a step: so many steps a read task


@pytest.fixture
def dealer(monkeypatch: pytest.MonkeyPatch) -> Dealer:
    """Of the first of two streams, which serves one of four workers; a segment is a read task."""
    context = SimpleNamespace(
        execution_options=SimpleNamespace(), issue_detectors_config=SimpleNamespace()
    )
    monkeypatch.setattr(DataContext, "get_current", lambda: context)
    monkeypatch.setattr(module, "pace_data", lambda *rest: None)
    data = SimpleNamespace(streaming_split=lambda workers, equal: ["part"] * workers)
    monkeypatch.setattr(Dealer, "_dataset", lambda *rest: data)
    shards: Any = SimpleNamespace(files=[])
    reading = Reading(shards, ReadingOrder(np.full(100, 40), 0, BATCH, BATCH))
    part = StreamPart(Dealing(BATCH, 2, (0, 1, 4)), 0, "")
    dealer = Dealer(reading, [None, None], RunSteps(10**6, segment=1))
    dealer.serve(part, DecodeTasks())
    return dealer


def test_a_segment_is_in_work_until_all_its_images_are_decoded(dealer: Dealer) -> None:
    """The next one is planned while it begins, and must not make it count as done."""
    steps = 2 * READ_STEPS  # two streams
    second, parts = dealer.open(0)
    assert (second, len(parts)) == (steps, 1)
    third, _ = dealer.open(second)
    assert third == 2 * steps
    assert not dealer.all_decoded(0, 0.0) and not dealer.all_decoded(second, 0.0)
    images = steps * BATCH // 4  # one of four workers
    dealer.note_decoded(0, (0, 0), images - 2)
    assert not dealer.all_decoded(0, 0.0)
    dealer.note_decoded(0, (0, images - 2), 2)
    assert dealer.all_decoded(0, 0.0) and not dealer.all_decoded(second, 0.0)
    dealer.open(third)
    assert set(dealer.decoded) == {second, third}  # nothing grows with the run
    assert dealer.all_decoded(0, 0.0)
