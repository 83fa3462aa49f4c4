"""Python's search for garbage: off between stated steps, and as before at the end."""

from __future__ import annotations

import gc
import weakref

import pytest

from pipeline.train.parallel.garbage import EVERY, SETTLED, Garbage


class Knot:
    """Garbage that only a search finds."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_goes_at_stated_steps() -> None:
    frozen = gc.get_freeze_count()
    with Garbage() as garbage:
        assert not gc.isenabled() and gc.get_freeze_count() > 1000
        gone_at = []
        knot = weakref.ref(Knot())
        for step in range(1, 2 * EVERY + 1):
            garbage.after_step()
            if knot() is None:
                gone_at.append(step)
                knot = weakref.ref(Knot())
        assert gone_at == [SETTLED, EVERY, 2 * EVERY]
    assert gc.isenabled() and gc.get_freeze_count() == frozen == 0


def test_an_error_leaves_python_as_it_was() -> None:
    with pytest.raises(KeyError), Garbage():
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    try:
        with Garbage():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
