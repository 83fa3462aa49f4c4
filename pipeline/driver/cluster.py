"""Joins the Ray cluster there is, or starts a small one in this process."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pipeline import environment
from pipeline.driver.ray_internals import (
    RayletEnded,
    check_version,
    draining_nodes,
    gcs_client,
    own_process_group,
    own_sigterm,
    raylet_watched,
)
from pipeline.driver.signals import ended_by_sigterm
from pipeline.errors import PipelineError, PlacementError
from pipeline.heartbeat import doing
from pipeline.plan.nodes import Node

if TYPE_CHECKING:
    from pipeline.config.run import Resources
    from pipeline.plan.layout import Machine

log = logging.getLogger("pipeline")
T = TypeVar("T")
SAY_S = 30.0  # between two words about what is missing
TRIES = 3  # to start Ray on this machine
ANSWER_S = 5.0  # for a cluster's head to take a connection
ASK_S = 5.0  # between two orders: those of other jobs' data sets replace them every 20 s

QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # extra actors cost seconds at start
    # For so long a data set whose workers were killed keeps its share of the CPUs.
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Nodes about to go are watched by train.scaling, which does not wait for their last second.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Not for workers to start, but for their CPUs to be free; then another size is tried.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_COLOR_PREFIX": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
# Of a Ray that is started here. Without the first two, Ray and gloo listen on all addresses of the
# machine, for nodes that are not to come. Ray reads the first, on any system, when it is imported.
OWN_RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    "RAY_raylet_start_wait_time_s": "2",  # one look, then ray_internals looks again
    # Each process counts for a dashboard that is not started: a fourth of what an idle Ray costs.
    "RAY_enable_metrics_collection": "0",
}
ROOT = Path(__file__).resolve().parents[2]


def quiet_environment() -> None:
    """Sets Ray's switches for a readable console, unless the user set them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    environment.bypass_proxies()
    environment.name_user()
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    for name in ("ray.data", "ray.train", "ray.tune", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def joined(resources: Resources) -> Iterator[None]:
    """Inside, this process is a Ray driver; a Ray that was started here ends with it. It listens on
    loopback only. SIGTERM ends the process with 143.

    The cluster is the one of `RAY_ADDRESS` (set by `ray job submit`), else one on this machine.

    Raises:
        PipelineError: where the address answers nothing.
    """
    quiet_environment()
    address = os.environ.get("RAY_ADDRESS")
    if address:  # a loaded cluster needs more than the default 30
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")
    with ended_by_sigterm(), nullcontext() if address else _own_switches():
        check_version()  # imports Ray, which reads then whether it may listen beyond loopback
        yield from _joined(resources, address)


def _joined(resources: Resources, address: str | None) -> Iterator[None]:
    import ray

    variables = {name: os.environ[name] for name in QUIET} | {"PYTHONUTF8": "1"}
    folder = None
    options: dict[str, object]
    if address:
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # in a job, Ray sends the code itself
            variables["PYTHONPATH"] = _python_path()
        options = {"address": address, "runtime_env": {"env_vars": variables}}
    else:
        variables["PYTHONPATH"] = _python_path()
        variables["GLOO_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"]
        folder = environment.socket_folder()
        environment.own_token()
        options = {
            "address": "local",
            "num_cpus": resources.cpus,
            "object_store_memory": int(resources.object_store_gb * 2**30),
            "_temp_dir": folder,
            "include_dashboard": False,
            "runtime_env": {"env_vars": variables},
        }
    try:
        _connect(options, address)
        yield
    finally:
        with doing("ending Ray"):
            ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _connect(options: dict[str, Any], address: str | None) -> None:
    import ray
    from ray.exceptions import AuthenticationError, RayError

    try:
        debug = bool(os.environ.get("PIPELINE_DEBUG"))
        start = partial(ray.init, logging_level="error", log_to_driver=debug, **options)
        if address:
            with own_process_group(), own_sigterm(), doing(f"joining the Ray cluster at {address}"):
                start()
        else:
            with own_sigterm(), doing("starting Ray"):
                _until_started(start)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        if not address:
            raise
        if (
            isinstance(error, AuthenticationError)
            or "uthenticat" in str(error)
            or _refuses(address)
        ):
            raise PipelineError(
                f"the Ray cluster at RAY_ADDRESS={address} wants a token, which this job lacks",
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE (or RAY_AUTH_TOKEN) with the "
                "token of the cluster, or unset RAY_ADDRESS to run on this machine",
            ) from None
        reason = str(error).strip().splitlines()[0]
        raise PipelineError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {reason}",
            "start it, give host:6379 or auto (http://host:8265 is for `ray job submit`), "
            "or unset RAY_ADDRESS to run on this machine",
        ) from None
    if not address:
        _hide_token()


def _refuses(address: str) -> bool:
    """Whether a cluster is at host:port and refuses us."""
    from ray.exceptions import AuthenticationError

    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
        gcs_client(address)
    except AuthenticationError:
        return True
    except (OSError, ValueError, RuntimeError) as error:  # no address, no cluster, or another fault
        log.debug("asking %s whether it wants a token: %s", address, error)
    return False


def _until_started(start: Callable[[], object]) -> None:
    """Calls `start`, which starts Ray on this machine, again where Ray's raylet ends at once.

    A raylet gives its helper processes 15 s to start and then ends itself: on a loaded machine
    that is not enough. Ray would wait for it nevertheless, for minutes, and then raise.

    Raises:
        PipelineError: the raylet ended every time.
    """
    for number in range(1, TRIES + 1):
        with own_process_group() as processes, raylet_watched(processes):
            try:
                start()
                return
            except RayletEnded:
                for process in reversed(processes):
                    process.kill()
                for process in processes:
                    process.wait()
        if number < TRIES:
            log.info("ray         its raylet ended while it started (is the machine busy?); again")
    raise PipelineError(
        f"Ray could not be started on this machine: its raylet ended before it was ready, {TRIES} "
        "times in a row",
        "its helper processes must start within 15 s: end other work on this machine and try "
        "again, or set RAY_ADDRESS to a cluster that runs",
    )


@contextmanager
def _own_switches() -> Iterator[None]:
    missing = OWN_RAY.keys() - os.environ.keys()
    os.environ.update({name: OWN_RAY[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _hide_token() -> None:
    """Ray keeps its token in a file that it makes readable by every user of the machine."""
    with suppress(OSError, RuntimeError):  # there is none, or it is somebody else's
        token = Path.home() / ".ray" / "auth_token"
        token.chmod(token.stat().st_mode & 0o700)


class Seen(NamedTuple):
    """A node that is alive, and whether it will be taken away."""

    node: Node
    leaving: bool


def seen_nodes() -> dict[str, Seen]:
    """The nodes that are alive, by their id."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    draining = draining_nodes()
    seen = {}
    for node in ray.nodes():
        if node["Alive"]:
            has, key = node["Resources"], node["NodeID"]
            memory = float(has.get("memory", 0.0))
            room = Node(has.get("CPU", 0.0), has.get("GPU", 0.0), key == here, memory)
            seen[key] = Seen(room, key in draining)
    return seen


def machine() -> Machine:
    """What the nodes of the cluster have, and whether this CPU is fast in bfloat16."""
    from pipeline.plan.layout import Machine

    nodes = tuple(seen.node for seen in seen_nodes().values() if not seen.leaving)
    return Machine(
        cpus=max(1, int(sum(node.cpus for node in nodes))),
        gpus=int(sum(node.gpus for node in nodes)),
        bfloat16=cpu_has_bfloat16(),
        nodes=nodes,
    )


def with_room(make: Callable[[Machine], T], wait_s: float) -> T:
    """What `make` makes of the cluster, as soon as it has room for it.

    Meanwhile an autoscaler is asked for what is missing, and every half minute it is said.

    Args:
        make: raises `PlacementError` where there is no room.
        wait_s: how long to wait for nodes that may come; 0: not at all.

    Raises:
        PlacementError: there was no room until then.
    """
    begun = time.monotonic()
    said, asked = -SAY_S, -ASK_S
    try:
        while True:
            try:
                return make(machine())
            except PlacementError as error:
                waited = time.monotonic() - begun
                if waited >= wait_s:
                    what = f"{error.what}; waited {waited:.0f} s for more" if wait_s else error.what
                    raise PlacementError(what, error.hint, error.bundles) from None
                if waited - said >= SAY_S:
                    log.info("waiting     %s; for %.0f s more", error.what, wait_s - waited)
                    said = waited
                if waited - asked >= ASK_S:
                    asked = waited
                    _request(error.bundles)
                time.sleep(min(1.0, wait_s - waited))
    finally:
        # An order outlives the job; Ray Train and Ray Data ask for what they need themselves.
        if asked >= 0:
            _request([])


def _request(bundles: list[dict[str, float]]) -> None:
    """Asks an autoscaler, if there is one, for room for these."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX or AVX-512 BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def object_store() -> float:
    """Bytes of the object stores of the cluster together."""
    import ray

    return float(ray.cluster_resources().get("object_store_memory", 0))


def nodes() -> int:
    """Nodes alive in the cluster."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT)
