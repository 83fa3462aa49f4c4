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
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import ray

from pipeline.driver.cluster import SAY_S, Seen, seen_nodes
from pipeline.driver.mailbox import MOVE, SAVE, STOP
from pipeline.driver.ray_internals import free_resources
from pipeline.errors import PlacementError, StoppedError
from pipeline.plan.layout import Arrangement
from pipeline.plan.nodes import Node, Share
from pipeline.plan.plan import Plan
from pipeline.stream.dealer import DecodeTasks

LOOK_S = 3.0  # between two looks at the nodes while all is well
ANSWER_S = 20.0  # a group that must shrink and gives no answer waits for data that cannot come
SETTLE_S = 10.0  # so long new room must stay before a running group grows into it


class Scaling:
    """The rules of a run for its groups of workers, which `ray_internals.trainer` asks.

    Args:
        plan: of the run.
        feeder: handle of the run's feeder.
    """

    def __init__(self, plan: Plan, feeder: Any) -> None:
        self.plan, self.feeder = plan, feeder
        self.largest = plan.sizes[-1]
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

    def next_group(self) -> int | None:
        """The largest group that the nodes have room for; else a pause, and in the end an error.

        Raises:
            PlacementError: there was no room for `resources.replace_s` seconds.
            StoppedError: somebody wants the run to stop.
        """
        self._obey_stop()
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
        return None

    def _next_try(self, nodes: list[Node]) -> Arrangement | None:
        """The largest group; after one that did not come to run, the next smaller one in turn."""
        smaller = None
        if self.tried:
            self.settle_s = min(60 * SETTLE_S, 4 * self.settle_s)
            smaller = self.plan.arranged_on(nodes, self.tried - 1)
        return smaller or self.plan.arranged_on(nodes)

    def other_group(self, at: list[str]) -> int | None:
        """Moves the group off nodes that are about to go, and into room that has come.

        Args:
            at: for each worker of the group the id of its node.
        """
        self.waiting_since, self.tried = None, 0
        now = time.monotonic()
        if not self.request and now - self.looked < LOOK_S:
            return None
        self.looked = now
        nodes = seen_nodes()
        staying = [n.node for n in nodes.values() if not n.leaving]
        arrangement = self.plan.arranged_on(staying)
        size = len(at)
        if arrangement and arrangement.workers > size:  # into what others do not hold
            room = self.plan.arranged_on(free_nodes(nodes, at, self.plan.share))
            if not room or room.workers < arrangement.workers:
                arrangement = self.plan.arranged_on(staying, max(size, room.workers if room else 0))
        if self.request:
            # Nodes about to go still decode: the group has data and writes its checkpoint.
            there = self.plan.arranged_on([n.node for n in nodes.values()])
            return self._on_request(arrangement, starved=there is not None and there.workers < size)
        leaving = {key for key in at if key in nodes and nodes[key].leaving}
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
        return None

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

    def _on_request(self, arrangement: Arrangement | None, starved: bool) -> int | None:
        """What follows from a request that was acknowledged.

        Args:
            arrangement: where the group would go.
            starved: whether its workers lack the CPUs for decoding, and so cannot answer.
        """
        late = starved and arrangement is not None and time.monotonic() - self.asked > ANSWER_S
        if ray.get(self.feeder.acknowledged.remote()) < 0 and not late:
            return None
        moving, self.request = self.request == MOVE, ""
        if not moving or arrangement is None:
            return None
        self._release(arrangement)
        return self._resized(arrangement)

    def _resized(self, arrangement: Arrangement) -> int:
        if self.size and arrangement.workers != self.size:
            self._say(f"workers     {self.size} -> {arrangement.workers}")
        self.size = self.tried = arrangement.workers
        self.room_since, self.leaving = None, set()
        self._release(arrangement)
        return arrangement.workers

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


# ---- What a run that moves may have of a cluster that others use as well.
#
# That is what is free now, what its training workers hold, and what the actors that end with the
# group hold: decoders and readers. What other jobs hold, and this run's evaluator (which has no
# CPU), stays where it is.


def free_nodes(nodes: Mapping[str, Seen], workers: Iterable[str], share: Share) -> list[Node]:
    """The nodes that stay, each with what this run may have of it.

    Args:
        nodes: those that are alive, by id.
        workers: for each training worker the id of its node.
        share: what each of them reserves.
    """
    (free, helping), working = free_resources(), Counter(workers)
    ours = []
    for key, (node, leaving) in nodes.items():
        if not leaving:
            has, mine = free.get(key, {}), share.times(working[key])
            cpus = has.get("CPU", 0.0) + mine.cpus + helping.get(key, 0.0)
            gpus = has.get("GPU", 0.0) + mine.gpus
            ours.append(node._replace(cpus=min(node.cpus, cpus), gpus=min(node.gpus, gpus)))
    return ours
