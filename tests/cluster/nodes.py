"""A Ray cluster of several nodes on this machine: real `ray start` processes, killed for real.

Each node has processes, an object store and a temp folder of its own. `hosts.py` gives nodes an
address of their own as well. Nothing here is found by name: a node's processes are below its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

ROOT = Path(__file__).parents[2]
START_S = 240.0  # a loaded machine starts a node in half a minute
TRIES = 12  # of starting a node
STORE = 128 * 2**20
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
PDEATHSIG = 1  # PR_SET_PDEATHSIG
AGENT_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
RAY = str(Path(sys.executable).with_name("ray"))


class Stillborn(AssertionError):
    """A node that ended before it was there."""


class Place(Protocol):
    """Where a node lives if not on this machine as it is: see `hosts.Host`."""

    address: str

    def command(self, *argv: str) -> list[str]: ...
    def kill(self) -> None: ...


@dataclass
class Node:
    """One `ray start --block` and what it started.

    Attributes:
        name: for messages, and the value of the node's label `node`.
        process: `ray start`.
        log: what it printed.
        node_id: Ray's name for it, hex.
        place: the host that it runs on, None for this machine.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    node_id: str
    place: Place | None = None
    dead: bool = field(default=False, init=False)

    @property
    def folder(self) -> Path:
        """Its temp folder."""
        return self.log.with_suffix("")

    def processes(self) -> list[psutil.Process]:
        """All living processes of the node, `ray start` first."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def find(self, word: str) -> list[psutil.Process]:
        """Those whose name or command line has the word: `RayTrainWorker`, `raylet`."""
        found = []
        for process in self.processes():
            try:
                if word in " ".join([process.name(), *process.cmdline()]):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """Power off: SIGKILL for all processes of the node at once. Does nothing a second time."""
        self.dead = True
        if self.place is not None:
            self.place.kill()
        kill_tree(self.process)

    def terminate(self) -> None:
        """What a preemption notice does: SIGTERM for `ray start`, which drains the node."""
        self.process.send_signal(signal.SIGTERM)


class Cluster:
    """A head and any number of other nodes; `cluster()` makes one and ends it.

    Args:
        folder: short; temp folders and logs of the nodes are below it.
        env: for every node and every client: `RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`, …
    """

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.env = clean_environment() | dict(env or {})
        self.nodes: list[Node] = []
        self.started = 0
        self.address = ""  # host:port of the head's GCS
        self.dashboard = ""  # http://host:port, where jobs are submitted

    def head(self, cpus: int = 0, *, port: int = 0, **options: Any) -> Node:
        """Starts the head, or starts it again at the same ports after it was killed.

        Args:
            cpus: 0 keeps tasks off it.
            port: of the GCS; a free one where it is 0.
            options: as for `add`.
        """
        place = options.get("place")
        host = place.address if place else "127.0.0.1"
        if not self.address:
            self.address = f"{host}:{port or free_port()}"
            self.dashboard = f"http://{host}:{free_port()}"
        role = [
            "--head",
            f"--port={self.address.rpartition(':')[2]}",
            "--include-dashboard=true",
            f"--dashboard-host={host}",
            f"--dashboard-port={self.dashboard.rpartition(':')[2]}",
            f"--ray-client-server-port={free_port()}",
        ]
        return self._start("head", cpus, role, **options)

    def add(self, name: str, cpus: int, **options: Any) -> Node:
        """Starts one more node and waits until it has joined.

        Args:
            name: of the node; its label `node` has this value.
            cpus: of the node.
            options: `gpus`, `store` (object store, bytes), `labels`, `resources`, `env`,
                `place` (a `hosts.Host`), `arguments` (more options of `ray start`).
        """
        return self._start(name, cpus, [f"--address={self.address}"], **options)

    def _start(self, name: str, cpus: int, role: list[str], **options: Any) -> Node:
        """Starts a node; again, where its raylet gave up waiting for its agents.

        It gives them 15 s to import what they need (Ray 2.60), which a loaded machine may not keep.
        """
        for _ in range(TRIES - 1):
            try:
                return self._try_start(name, cpus, role, **options)
            except Stillborn:
                node = self.nodes.pop()
                kill_tree(node.process)
        return self._try_start(name, cpus, role, **options)

    def _try_start(
        self,
        name: str,
        cpus: int,
        role: list[str],
        *,
        gpus: int = 0,
        store: int = STORE,
        labels: Mapping[str, str] | None = None,
        resources: Mapping[str, float] | None = None,
        env: Mapping[str, str] | None = None,
        place: Place | None = None,
        arguments: tuple[str, ...] = (),
    ) -> Node:
        number = self.started
        self.started += 1
        temporary = self.folder / f"n{number}"
        temporary.mkdir()
        log = self.folder / f"n{number}.log"
        marks = ",".join(f"{k}={v}" for k, v in ({"node": name} | dict(labels or {})).items())
        command = [
            *(RAY, "start", "--block", "--disable-usage-stats"),
            *role,
            f"--node-ip-address={place.address if place else '127.0.0.1'}",
            f"--num-cpus={cpus}",
            f"--num-gpus={gpus}",
            f"--object-store-memory={store}",
            f"--resources={json.dumps(dict(resources or {}))}",
            f"--labels={marks}",
            f"--temp-dir={temporary}",
            # Free ports instead of the usual ones, which other nodes here have. They are given, so
            # that the raylet need not wait for agents to say theirs: after 15 s it gives up.
            *(f"--{port}={free_port()}" for port in AGENT_PORTS),
            *("--min-worker-port=0", "--max-worker-port=0"),
            f"--include-log-monitor={'true' if name == 'head' else 'false'}",
            *arguments,
        ]
        environment = self.env | dict(env or {})
        with log.open("wb") as written:
            process = subprocess.Popen(
                place.command(*command) if place else command,
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_adopt_orphans,
            )
        node = Node(name, process, log, "", place)
        self.nodes.append(node)
        wait_for(
            lambda: _said(node, "Ray runtime started"),
            f"node {name} to start",
            explain=lambda: log.read_text()[-4000:],
        )
        node.node_id = wait_for(lambda: _node_id(node), f"the raylet of node {name}")
        return node

    def environment(self) -> dict[str, str]:
        """Of a client of this cluster: `RAY_ADDRESS` for a driver on one of its nodes."""
        return self.env | {"RAY_ADDRESS": self.address}

    def ray(self, *argv: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Runs a command of Ray's: `cluster.ray("status")`, `cluster.ray("job", "list")`.

        Job commands reach the dashboard through `RAY_API_SERVER_ADDRESS`.
        """
        return self.run(RAY, *argv, timeout=timeout)

    def run(self, *argv: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Runs a client on the head's host."""
        place = self.nodes[0].place if self.nodes else None
        return subprocess.run(
            place.command(*argv) if place else list(argv),
            env=self.environment() | {"RAY_API_SERVER_ADDRESS": self.dashboard},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def drain(self, node: Node, deadline_s: int, *, message: str = "preempted by a test") -> None:
        """A preemption notice through the cluster: the node goes on, its actors may see it.

        Raises:
            AssertionError: where Ray refuses.
        """
        shown = self.ray(
            "drain-node",
            f"--address={self.address}",
            f"--node-id={node.node_id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            f"--reason-message={message}",
            f"--deadline-remaining-seconds={deadline_s}",
        )
        assert shown.returncode == 0, shown.stdout + shown.stderr

    def alive(self) -> dict[str, bool]:
        """Node id: whether the head takes it for alive. Asks the head each time."""
        code = (
            "import json, os\n"
            "from ray._raylet import GcsClient\n"
            "found = GcsClient(address=os.environ['RAY_ADDRESS']).get_all_node_info(timeout=30)\n"
            "print(json.dumps({k.hex(): v.state == 0 for k, v in found.items()}))\n"
        )
        shown = self.run(sys.executable, "-c", code)
        assert shown.returncode == 0, shown.stdout + shown.stderr
        found: dict[str, bool] = json.loads(shown.stdout.splitlines()[-1])
        return found

    def close(self) -> None:
        """Kills what is left, and removes the temp folders."""
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def cluster(env: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """An empty cluster: start its head, then add nodes. All of it is gone at the end."""
    # Unix socket paths are limited to 107 bytes, so the folder must be short.
    made = Cluster(Path(tempfile.mkdtemp(prefix="rc", dir="/tmp")), env)
    try:
        yield made
    finally:
        made.close()


def token() -> dict[str, str]:
    """Environment with a token of its own, for `cluster(env=token())`."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(24)}


def clean_environment() -> dict[str, str]:
    """Of this process, without what would lead a job to another cluster or server."""
    gone = {"MLFLOW_TRACKING_URI", "PIPELINE_DEBUG", "PYTHONPATH"}
    kept = {k: v for k, v in os.environ.items() if k not in gone and not k.startswith("RAY_")}
    # `ray` and `python` of this environment, in jobs as well, which are started by a shell
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    more = {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "180",  # a loaded machine needs more than 30
    }
    return kept | more | {"PATH": path}


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        port: int = taken.getsockname()[1]
    return port


def wait_for(
    ready: Callable[[], Any],
    what: str,
    timeout: float = START_S,
    explain: Callable[[], str] = lambda: "",
) -> Any:
    """What `ready` gives once it is true.

    Raises:
        AssertionError: after `timeout` seconds, naming `what`.
    """
    end = time.monotonic() + timeout
    while not (found := ready()):
        assert time.monotonic() < end, f"waited {timeout:.0f} s for {what}\n{explain()}"
        time.sleep(0.2)
    return found


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """SIGKILL for a process and everything below it, and waits until they are gone.

    It is stopped first, so that it starts nothing meanwhile; orphans come to it (`_adopt_orphans`),
    so none of them gets away.
    """
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGSTOP)
    root = psutil.Process(process.pid)
    while below := [p for p in root.children(recursive=True) if living(p)]:
        for child in below:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(below, timeout=0.1)
    process.kill()
    process.wait()


def living(process: psutil.Process) -> bool:
    """Whether it is there, and no zombie that nobody has taken away yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_with_parent(by: int = signal.SIGKILL) -> None:
    """In a process before it begins: a signal for it when the thread ends that started it."""
    ctypes.CDLL(None, use_errno=True).prctl(PDEATHSIG, by, 0, 0, 0)


def _adopt_orphans() -> None:
    """In `ray start` before it begins: orphans come to it, and it ends when the tests end."""
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)
    end_with_parent(signal.SIGTERM)


def _said(node: Node, words: str) -> bool:
    text = node.log.read_text()
    if node.process.poll() is not None:
        raise Stillborn(f"node {node.name} ended at its start:\n{text}")
    for errors in node.folder.glob("session_*/logs/raylet.err"):
        if "Check failed" in (said := errors.read_text()):
            raise Stillborn(f"the raylet of node {node.name} ended at its start:\n{said[:2000]}")
    return words in text


def _node_id(node: Node) -> str:
    """From the command line of the node's raylet."""
    for process in node.find("raylet"):
        try:
            found = re.search(r"--node[-_]id=([0-9a-f]{56})", " ".join(process.cmdline()))
        except psutil.Error:
            continue
        if found:
            return found[1]
    return ""
