"""What we use of Ray's private parts, and what for; of Ray Data's in `data_internals`.

Ray may change any of them between two releases. So pyproject.toml has a ceiling on Ray, and what is
missing is one sentence (`private`). Ray is imported where it is used: `ray.train` loads torch. One
more name, of an arrow type, is in storage/places.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from pipeline.errors import PipelineError

log = logging.getLogger("pipeline")
FIRST, BELOW = (2, 58), (2, 61)  # the releases of pyproject.toml
START_S = 180.0  # a raylet that is neither ready nor at its end after so long is taken for ended


def check_version() -> None:
    """Warns of a Ray that this was never run with."""
    import ray

    major, minor = ray.__version__.split(".")[:2]
    if not FIRST <= (int(major), int(minor)) < BELOW:
        log.warning("%s", f"this is Ray {ray.__version__}; {_wanted()}")


def _wanted() -> str:
    known = ",".join(f"{sign}{a}.{b}" for sign, (a, b) in ((">=", FIRST), ("<", BELOW)))
    return f"install one that it was written for: pip install 'ray[data,train,default]{known}'"


@contextmanager
def private(why: str) -> Iterator[None]:
    """Around look-ups of private parts: says which is missing, what it is for, which Ray has it."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        import ray

        raise PipelineError(
            f"Ray {ray.__version__} is not as expected: {error}; it is needed {why}", _wanted()
        ) from error


def hooks(of: Any, *names: str) -> None:
    """Looks up what we override: under another name ours would never be called."""
    for name in names:
        getattr(of, name)


# ---- Ray on this machine: its processes, their groups and signals, and its raylet.


class RayletEnded(Exception):
    """The raylet, the process of Ray that starts workers, ended before it was ready."""


@contextmanager
def raylet_watched(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Inside, Ray's look-up of its own node, which waits for the raylet, ends when that ended."""
    with private("to see that Ray ended while it started"):
        from ray._private import services

        plain = services.get_node

    def ended(process: subprocess.Popen[bytes]) -> bool:
        raylet = isinstance(process.args, list) and str(process.args[0]).endswith("/raylet")
        return raylet and process.poll() is not None

    def get_node(*arguments: Any) -> Any:
        until = time.monotonic() + START_S
        while time.monotonic() < until and not any(map(ended, processes)):
            with suppress(RuntimeError):  # it is not there yet
                return plain(*arguments)
            time.sleep(1.0)
        raise RayletEnded

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = plain


@contextmanager
def own_process_group() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Inside, processes that Ray starts get a process group of their own. Gives those processes.

    `timeout`, schedulers and terminals send SIGTERM to the whole group of a job. Ray's processes
    would end on it at once, and with them the workers that should write a checkpoint first. They
    still end with this process, as the kernel sees to it. Where it does not (macOS), Ray's reaper
    ends them, for which they must stay in this group.
    """
    with private("so that a signal to the job does not end Ray before the checkpoint"):
        from ray._private import services, utils

        apart = {"start_new_session": True} if utils.detect_fate_sharing_support() else {}
        plain = services.ConsolePopen
    started: list[subprocess.Popen[bytes]] = []

    class Noted(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, **apart)
            started.append(self)

    services.ConsolePopen = Noted
    try:
        yield started
    finally:
        services.ConsolePopen = plain


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Inside, Ray sets no Python handler of its own, which exits with 15 and leaves its folder
    behind. The one that its core sets meanwhile, which aborts after 3 s, is replaced at the end.
    """
    with private("so that SIGTERM leads to a checkpoint"):
        from ray._private import utils

        plain, mine = utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = plain
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, mine or signal.SIG_DFL)


# ---- What a cluster says of itself only to who asks its head.


def gcs_client(address: str) -> Any:
    """A client of a cluster's head: it says why it cannot connect, where `ray.init` does not."""
    with private("to tell a wrong token from a cluster that is not there"):
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

    return GcsClient(address=address)


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be taken away; the public list of nodes does not tell them."""
    with private("to move workers off nodes that will be taken away"):
        from ray._private.state import state

        return set(state.get_draining_nodes() or ())


def free_resources() -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """What is free on each node, by its id, and the CPUs there that actors of this job hold outside
    placement groups. The public functions add all nodes up, and list actors without resources.
    """
    import ray

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    cpus: dict[str, float] = defaultdict(float)
    with private("to let a group of workers grow only into what others leave"):
        from ray._private.state import state
        from ray.core.generated import gcs_pb2

        free = state.available_resources_per_node()
        for row in state._connect_and_get_accessor().get_actor_table(job, "ALIVE"):
            actor = gcs_pb2.ActorTableData.FromString(row)
            if not actor.placement_group_id:
                cpus[actor.address.node_id.hex()] += actor.required_resources.get("CPU", 0.0)
    return free, cpus


# ---- Ray Train: how many workers a group has, when it moves, and who handles signals.


class GroupRules(Protocol):
    """The size of the group to start, or None: there is no room, or the running one stays."""

    largest: int  # workers that an autoscaler is asked for

    def next_group(self) -> int | None:
        """Asked again and again while no group runs."""

    def other_group(self, at: list[str]) -> int | None:
        """The same while one runs; `at` has for each worker the id of its node."""


def trainer(worker: Any, rules: GroupRules, saved: Callable[[], int], **options: Any) -> Any:
    """A `TorchTrainer` with rules of ours, which leaves signals to the job.

    Args:
        worker: function that each worker runs.
        rules: for the size of the group.
        saved: gives the step of the newest checkpoint; failures count from one to the next.
        options: of `TorchTrainer`, with a `scaling_config` and a `run_config`.
    """
    from ray.train.torch import TorchTrainer

    with private("to size and restart groups of training workers by rules of ours"):
        from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
        from ray.train.v2._internal.execution.scaling_policy import (
            NoopDecision,
            ResizeDecision,
            ScalingPolicy,
        )

        scaling, failures = options["scaling_config"], options["run_config"].failure_config
        hooks(TorchTrainer, "_initialize_and_run_controller", "_register_sigint_handler")
        hooks(ScalingPolicy, "_get_num_workers_for_resource_request")
        hooks(DefaultFailurePolicy(failures), "_worker_group_failures")
        per_worker = scaling._resources_per_worker_not_none

    class Sized(ScalingPolicy):  # type: ignore[misc]
        def _get_num_workers_for_resource_request(self) -> int:
            return rules.largest

        def make_decision_for_non_running_worker_group(self) -> Any:
            self._maybe_send_resource_request()
            return self._decision(rules.next_group())

        def make_decision_for_running_worker_group(
            self, worker_group_state: Any, worker_group_status: Any
        ) -> Any:
            self._maybe_send_resource_request()
            at = [worker.metadata.node_id for worker in worker_group_state.workers]
            return self._decision(rules.other_group(at))

        def _decision(self, size: int | None) -> Any:
            if size is None:
                return NoopDecision()
            return ResizeDecision(num_workers=size, resources_per_worker=per_worker)

    class Counted(DefaultFailurePolicy):  # type: ignore[misc]
        newest = -1

        def make_decision(self, training_failed_error: Any) -> Any:
            if (step := saved()) > self.newest:
                self.newest, self._worker_group_failures = step, 0
            return super().make_decision(training_failed_error)

    policies = dict(scaling_policy=Sized(scaling), failure_policy=Counted(failures))

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            return super()._initialize_and_run_controller(**parts | policies)

        def _register_sigint_handler(self, controller: Any) -> None:
            """Ctrl-C leads to a checkpoint (`train.run`), where Ray's handler drops the run."""

    return Trainer(worker, **options)


# ---- Ray Serve: where the replicas of an endpoint listen.


def serve_on_loopback() -> None:
    """For a replica's constructor: Ray Serve then opens a port for calls, which are pickles, on all
    addresses. A cluster needs that, in a network of its own (SECURITY.md); a laptop does not.
    """
    with private("so that the endpoint of a laptop is for this machine alone"):
        from ray.serve._private import replica

        opening = replica.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> Any:
        return opening(server, address.replace("[::]:", "127.0.0.1:"))

    replica.add_port_to_grpc_server = on_loopback
