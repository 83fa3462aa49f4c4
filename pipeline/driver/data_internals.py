"""What we use of Ray Data's private parts, and what for: how far reading runs ahead of decoding,
what scheduling costs, how executions share a cluster. The rest of Ray's are in `ray_internals`.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

from pipeline.driver.ray_internals import hooks, private

TURN_S = 0.05  # of Ray Data's scheduling loop


class Limits(NamedTuple):
    """What one of several executions may take of the cluster."""

    cpus: float
    streams: int  # executions that share the object store

    def resources(self) -> Any:
        """The same as Ray Data has it."""
        import ray

        with private("to share the cluster out between streams"):
            from ray.data._internal.execution.interfaces import ExecutionResources

        store = ray.cluster_resources().get("object_store_memory", 0.0)
        return ExecutionResources(cpu=self.cpus, object_store_memory=store / self.streams)


def pace_data(context: Any, ahead: float, buffer: int, limits: Limits | None = None) -> None:
    """Sets the pace of data sets: encoded bytes that may wait, of those that decoders have been
    given, and blocks of a task that wait to be noticed; and what the execution may take.
    """
    with private("to hold read tasks back and to slow the loop that schedules them"):
        from ray.data._internal.execution import backpressure_policy as rules
        from ray.data._internal.execution.execution_callback import ExecutionCallback

        plain = rules.DownstreamCapacityBackpressurePolicy
        key = rules.ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY
        enabled = [*rules.ENABLED_BACKPRESSURE_POLICIES]
        hooks(plain, "_get_output_pressure", "_should_skip_backpressure")
        hooks(plain, "_get_downstream_capacity_size_bytes", "OBJECT_STORE_BUDGET_UTIL_THRESHOLD")
        hooks(ExecutionCallback, "on_execution_step", "before_execution_starts")
        hooks(context, "_max_num_blocks_in_streaming_gen_buffer")

    class ReadAhead(plain):  # type: ignore[misc, valid-type]
        """Ray's own rule, for read tasks alone, from the first byte on, and with a limit of ours.

        Ray Data lets an operator fill its share of the object store before it slows it down.
        Reading is many times faster than decoding, so that share would always be full of encoded
        images that wait: memory touched for nothing, and the first to be spilled. Where decoders
        have nothing in work they either do not run yet, then one portion that waits is enough, or
        the next in turn is not read yet: then nothing is held back, so what was read out of its
        turn cannot block what the order asks for.
        """

        OBJECT_STORE_BUDGET_UTIL_THRESHOLD = 0.0
        name = "ReadAhead"

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            with private("to hold read tasks back"):
                hooks(self, "_backpressure_capacity_ratio", "_topology")
            self._backpressure_capacity_ratio = ahead

        def _get_output_pressure(self, op: Any) -> float:
            idle = self._get_downstream_capacity_size_bytes(op) == 0
            if idle and self._topology[op].output_queue:
                return math.inf
            return float(super()._get_output_pressure(op))

        def _should_skip_backpressure(self, op: Any) -> bool:
            return "_Read" not in op.name or bool(super()._should_skip_backpressure(op))

    class Turns(ExecutionCallback):  # type: ignore[misc]
        """20 turns a second, each of which handles all that is ready, are plenty. While a read task
        waits for room, its next block counts as ready, so the wait of Ray Data's scheduling loop
        returns at once and takes 60 % of a core for nothing (Ray 2.60, seen in a profile).
        """

        shared_out = False  # in this turn

        def before_execution_starts(self, executor: Any) -> None:
            """What an execution may take, and that it is shared out between its operators once a
            turn. Ray Data does it after each task that it starts: a third of its loop's time, for
            operators whose tasks are limited by their numbers here.

            Executions side by side share each node's CPUs in whole numbers: more of them than a
            node has CPUs would get none.
            """
            with private("to slow the loop that schedules data sets"):
                manager, plain = executor._resource_manager, "_update_allocated_budgets"
                share_out = getattr(manager, plain)

            def once_a_turn() -> None:
                if not self.shared_out:
                    self.shared_out = True
                    share_out()

            setattr(manager, plain, once_a_turn)
            if limits is not None:
                with private("to share the cluster out between streams"):
                    hooks(executor._cluster_autoscaler, "get_total_resources")
                    executor._cluster_autoscaler.get_total_resources = limits.resources

        def on_execution_step(self, executor: Any) -> None:
            self.shared_out = False
            time.sleep(TURN_S)

    context.set_config(key, [*enabled, ReadAhead])
    context.custom_execution_callback_classes.append(Turns)
    context._max_num_blocks_in_streaming_gen_buffer = buffer


def end_split(parts: list[Any]) -> None:
    """Ends the execution behind the parts of `streaming_split`, which lives while workers hold one
    of them; there is no public call for it.
    """
    import ray

    with private("to end the data of a group of workers that is gone"):
        ray.kill(parts[0]._coord_actor)


def near(node: str) -> dict[str, Any]:
    """Options of tasks and actors that are to run on a node, or elsewhere where it is full, or
    gone. None for a node without a name.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not node:
        return {}
    there = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
    return {"scheduling_strategy": there}
