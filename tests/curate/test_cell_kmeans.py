"""k-means on the sphere against a plain loop."""

from __future__ import annotations

import numpy as np

from pipeline.curate.copies import cell_fit
from pipeline.curate.rows.exact import unit_half
from tests.curate.planted import planted


def test_a_round_of_lloyd_is_the_plain_loop() -> None:
    sample = planted(4000, dim=32)[0]
    x, centres = sample[:300], sample[1000:1010]
    which = (x.astype(float) @ centres.astype(float).T).argmax(1)
    expected = centres.copy()
    for cell in set(which):
        expected[cell] = unit_half(x[which == cell].astype(float).sum(0))
    assert np.array_equal(cell_fit.lloyd(x, centres, 1), expected)
