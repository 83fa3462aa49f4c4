"""The patches that iBOT scores, as places in the packed views."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Masked(NamedTuple):
    """The patches that iBOT scores.

    Their number changes from step to step, and every new shape costs: kernels of oneDNN are kept
    by shape, compiled ones are made anew. So `places` is filled up with the first patch; what the
    networks say after `rows` of them is used nowhere.
    """

    places: Tensor  # int64 [M or more], flat places in [V * P]
    rows: int  # M
