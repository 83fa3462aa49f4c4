"""How many workers the next group has, when the running one moves, and when to give up.

Ray Train asks a scaling policy: while no group runs, how large the next one is to be; while one
runs, whether to replace it. Its own policies count fractional CPUs roughly, know nothing of sizes
that do not divide a batch, wait for ever, and take workers away between two checkpoints. This one
looks at the nodes that are there and not about to go, and lets a group that must move write a
checkpoint first. Decoders are let go before, as they hold the CPUs that workers need.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._private.state import state
from ray.core.generated import gcs_pb2
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2.api.config import FailureConfig, ScalingConfig

from pipeline.driver.cluster import Seen, seen_nodes
from pipeline.driver.mailbox import MOVE, SAVE, STOP
from pipeline.errors import PlacementError, StoppedError
from pipeline.plan.layout import Arrangement
from pipeline.plan.nodes import Node, Share
from pipeline.plan.plan import Plan
from pipeline.stream.feeder import DecodeTasks

SAY_S = 30.0  # between two words about what is missing
LOOK_S = 3.0  # between two looks at the nodes while all is well
ANSWER_S = 20.0  # a group that must shrink and gives no answer waits for data that cannot come
SETTLE_S = 10.0  # so long new room must stay before a running group grows into it


class Scaling(ScalingPolicy):  # type: ignore[misc]
    """The policy of a run.

    Args:
        config: what Ray Train knows of the workers.
        plan: of the run.
        feeder: handle of the run's feeder.
    """

    def __init__(self, config: ScalingConfig, plan: Plan, feeder: Any) -> None:
        super().__init__(config)
        self.plan, self.feeder = plan, feeder
        self.waiting_since: float | None = None
        self.said = self.looked = 0.0
        self.room_since: float | None = None
        self.starved_since: float | None = None
        self.asked = 0.0
        self.size = 0  # of the newest group
        self.tried = 0  # the same, until it runs
        self.settle_s = SETTLE_S  # longer after room that was not free
        self.leaving: set[str] = set()  # nodes about to go for which something has been asked
        self.request = ""

    def _get_num_workers_for_resource_request(self) -> int:
        return self.plan.sizes[-1]

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """The largest group that the nodes have room for; else a pause, and in the end an error.

        Raises:
            PlacementError: there was no room for `resources.replace_s` seconds.
            StoppedError: somebody wants the run to stop.
        """
        self._obey_stop()
        self._maybe_send_resource_request()
        now = time.monotonic()
        if self.waiting_since is None:
            self.waiting_since = now
            self._release(None)
        there = [seen.node for seen in seen_nodes().values() if not seen.leaving]
        arrangement = self._next_try(there)
        waited, limit = now - self.waiting_since, self.plan.config.resources.replace_s
        what = self.plan.no_room_on(there).what
        if arrangement:
            count = arrangement.workers
            what = f"{count} workers of {self.plan.share} each fit, but others use the room"
        if waited > limit:
            raise self._gave_up(what, waited)
        if (self.tried or not arrangement) and now - self.said >= SAY_S:
            self.said = now
            self._say(f"waiting     {what}; for {limit - waited:.0f} s more")
        if arrangement:
            return self._resized(arrangement)
        time.sleep(1.0)  # the loop that asks does not pause by itself
        return NoopDecision()

    def _next_try(self, nodes: list[Node]) -> Arrangement | None:
        """The largest group; after one that did not come to run, the next smaller one in turn."""
        smaller = None
        if self.tried:
            self.settle_s = min(60 * SETTLE_S, 4 * self.settle_s)
            smaller = self.plan.arranged_on(nodes, self.tried - 1)
        return smaller or self.plan.arranged_on(nodes)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Moves the group off nodes that are about to go, and into room that has come."""
        self._maybe_send_resource_request()
        self.waiting_since, self.tried = None, 0
        now = time.monotonic()
        if not self.request and now - self.looked < LOOK_S:
            return NoopDecision()
        self.looked = now
        nodes = seen_nodes()
        staying = [n.node for n in nodes.values() if not n.leaving]
        arrangement = self.plan.arranged_on(staying)
        size = len(worker_group_state.workers)
        if arrangement and arrangement.workers > size:  # into what others do not hold
            at = [worker.metadata.node_id for worker in worker_group_state.workers]
            room = self.plan.arranged_on(free_nodes(nodes, at, self.plan.share))
            if not room or room.workers < arrangement.workers:
                arrangement = self.plan.arranged_on(staying, max(size, room.workers if room else 0))
        if self.request:
            # Nodes about to go still decode: the group has data and writes its checkpoint.
            there = self.plan.arranged_on([n.node for n in nodes.values()])
            return self._on_request(arrangement, starved=there is not None and there.workers < size)
        mine = {worker.metadata.node_id for worker in worker_group_state.workers}
        leaving = {key for key in mine if key in nodes and nodes[key].leaving}
        if leaving - self.leaving:
            self.leaving |= leaving
            where = f"{len(leaving)} node{'s' if len(leaving) > 1 else ''} with training workers"
            self._say(f"notice      {where} will be taken away; writing a checkpoint first")
            self._request(MOVE if arrangement else SAVE)
        elif arrangement and arrangement.workers != size and not leaving:
            self.room_since = self.room_since or now
            # A node may be found dead after its workers were: then the group came up too large,
            # and no CPU is left for decoding.
            if arrangement.workers < size or now - self.room_since >= self.settle_s:
                self._request(MOVE)
        else:
            self.room_since = None
        self._complain([seen.node for seen in nodes.values()], now)
        return NoopDecision()

    def _complain(self, nodes: list[Node], now: float) -> None:
        """Says what is missing where the CPUs for decoding went while workers run.

        Raises:
            PlacementError: they did not come back for `resources.replace_s` seconds.
            StoppedError: somebody wants the run to stop; the workers wait and cannot.
        """
        if self.plan.arranged_on(nodes):
            self.starved_since = None
            return
        self.starved_since = self.starved_since or now
        waited, limit = now - self.starved_since, self.plan.config.resources.replace_s
        if waited < ANSWER_S:
            return
        self._obey_stop()
        what = self.plan.no_room_on(nodes).what
        if waited > limit:
            raise self._gave_up(what, waited)
        if now - self.said >= SAY_S:
            self.said = now
            self._say(f"waiting     {what}; for {limit - waited:.0f} s more")

    def _obey_stop(self) -> None:
        """For when there are no workers that could obey."""
        if ray.get(self.feeder.wait_request.remote(0.0)) == STOP:
            raise StoppedError("training was stopped", "the same command goes on")

    def _gave_up(self, what: str, waited: float) -> PlacementError:
        return PlacementError(
            f"{what}; waited {waited:.0f} s for it",
            "the same command goes on from the last checkpoint once there is room; "
            "resources.replace_s says how long to wait",
        )

    def _on_request(self, arrangement: Arrangement | None, starved: bool) -> ScalingDecision:
        """What follows from a request that was acknowledged.

        Args:
            arrangement: where the group would go.
            starved: whether its workers lack the CPUs for decoding, and so cannot answer.
        """
        late = starved and arrangement is not None and time.monotonic() - self.asked > ANSWER_S
        if ray.get(self.feeder.acknowledged.remote()) < 0 and not late:
            return NoopDecision()
        moving, self.request = self.request == MOVE, ""
        if not moving or arrangement is None:
            return NoopDecision()
        self._release(arrangement)
        return self._resized(arrangement)

    def _resized(self, arrangement: Arrangement) -> ResizeDecision:
        if self.size and arrangement.workers != self.size:
            self._say(f"workers     {self.size} -> {arrangement.workers}")
        self.size = self.tried = arrangement.workers
        self.room_since, self.leaving = None, set()
        self._release(arrangement)
        return ResizeDecision(
            num_workers=arrangement.workers,
            resources_per_worker=self.scaling_config._resources_per_worker_not_none,
        )

    def _request(self, request: str) -> None:
        self.request, self.room_since, self.asked = request, None, time.monotonic()
        ray.get(self.feeder.request.remote(request))

    def _release(self, arrangement: Arrangement | None) -> None:
        """Lets the decoders go; the next ones take what the next group leaves."""
        self.request = ""
        tasks = (
            DecodeTasks(arrangement.decode_cpus, arrangement.decode_tasks) if arrangement else None
        )
        ray.get(self.feeder.release.remote(tasks))

    def _say(self, line: str) -> None:
        self.feeder.say.remote(logging.WARNING, line)


class RestartPolicy(DefaultFailurePolicy):  # type: ignore[misc]
    """Counts failures of the workers between two checkpoints, not over the life of the run."""

    def __init__(self, config: FailureConfig, feeder: Any) -> None:
        super().__init__(config)
        self.feeder, self.saved = feeder, -1

    def make_decision(self, training_failed_error: Any) -> Any:
        """As Ray decides, with the count begun anew where training got on since the last one."""
        saved = ray.get(self.feeder.saved.remote())
        if saved > self.saved:
            self.saved, self._worker_group_failures = saved, 0
        return super().make_decision(training_failed_error)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` with the policies above; signals stay with the job."""

    def __init__(self, *arguments: Any, scaling: Scaling, restarts: RestartPolicy, **options: Any):
        super().__init__(*arguments, **options)
        self._policies = {"scaling_policy": scaling, "failure_policy": restarts}

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        return super()._initialize_and_run_controller(**options | self._policies)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ctrl-C leads to a checkpoint (`train.run`), where Ray's handler drops the run."""


# ---- What a run that moves may have of a cluster that others use as well.
#
# That is what is free now, what its training workers hold, and what the actors that end with the
# group hold: decoders and readers. What other jobs hold, and this run's evaluator, stays where it
# is.


def free_nodes(nodes: Mapping[str, Seen], workers: Iterable[str], share: Share) -> list[Node]:
    """The nodes that stay, each with what this run may have of it.

    Args:
        nodes: those that are alive, by id.
        workers: for each training worker the id of its node.
        share: what each of them reserves.
    """
    free, working = state.available_resources_per_node(), Counter(workers)
    helping = _helpers_cpus()
    ours = []
    for key, (node, leaving) in nodes.items():
        if not leaving:
            has, mine = free.get(key, {}), share.times(working[key])
            cpus = has.get("CPU", 0.0) + mine.cpus + helping.get(key, 0.0)
            gpus = has.get("GPU", 0.0) + mine.gpus
            ours.append(node._replace(cpus=min(node.cpus, cpus), gpus=min(node.gpus, gpus)))
    return ours


def _helpers_cpus() -> dict[str, float]:
    """CPUs that actors of this job hold, by node; those of training workers belong to their group
    of bundles, and the evaluator has none.
    """
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    cpus: dict[str, float] = defaultdict(float)
    # `actor_table` has this already, without the resources
    for row in state._connect_and_get_accessor().get_actor_table(job, "ALIVE"):
        actor = gcs_pb2.ActorTableData.FromString(row)
        if not actor.placement_group_id:
            cpus[actor.address.node_id.hex()] += actor.required_resources.get("CPU", 0.0)
    return cpus
