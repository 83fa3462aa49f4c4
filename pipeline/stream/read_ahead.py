"""How far read tasks may run ahead of the decoders, by what the decoders have in work.

Ray Data lets an operator fill its share of the object store before it slows it down. Reading is
many times faster than decoding, so that share would always be full of encoded images that wait:
memory that is touched for nothing, and the first thing to be spilled where images are large.
"""

from __future__ import annotations

import math
from typing import Any

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    DownstreamCapacityBackpressurePolicy,
)

_RATIO = "raydino.read_ahead"


class ReadAhead(DownstreamCapacityBackpressurePolicy):  # type: ignore[misc]
    """Ray's own rule, for read tasks alone, from the first byte on, and with a limit of ours.

    Where decoders have nothing in work they either do not run yet, then one portion that waits is
    enough, or the next in turn is not read yet: then nothing is held back, so what was read out of
    its turn cannot block what the order asks for.
    """

    OBJECT_STORE_BUDGET_UTIL_THRESHOLD = 0.0

    def __init__(self, context: Any, *arguments: Any) -> None:
        super().__init__(context, *arguments)
        self._backpressure_capacity_ratio = context.get_config(_RATIO)

    @property
    def name(self) -> str:
        """For Ray's logs."""
        return "ReadAhead"

    def _get_output_pressure(self, op: Any) -> float:
        if self._get_downstream_capacity_size_bytes(op) == 0 and self._topology[op].output_queue:
            return math.inf
        return float(super()._get_output_pressure(op))

    def _should_skip_backpressure(self, op: Any) -> bool:
        return "_Read" not in op.name or bool(super()._should_skip_backpressure(op))


def limit_reading(context: Any, ratio: float) -> None:
    """Adds the rule to those of a `ray.data.DataContext`.

    Args:
        context: of the data set.
        ratio: encoded bytes that may wait, of those that decoders have been given.
    """
    context.set_config(_RATIO, ratio)
    rules = [*ENABLED_BACKPRESSURE_POLICIES, ReadAhead]
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, rules)
