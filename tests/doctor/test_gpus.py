"""GPU nodes without GPUs: what each probe may say, processes that hang, and a real all-reduce."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config.load import load
from pipeline.doctor import gpu_node, gpus
from pipeline.doctor.gpu_node import Group, Node, Ran, gpus_of, reduced_of, run_limited, with_kernel
from pipeline.doctor.gpu_report import Gpu, NodeReport, Reduced, driver_too_old, network
from pipeline.doctor.gpus import Seat, examined, seat_of, together
from pipeline.driver.compiler import Compiler
from tests.cluster.nodes import living, wait_for

GCC = Compiler("gcc 12", True, "")
H100 = Gpu(0, "NVIDIA H100 80GB HBM3", "580.95.05", 3)
WHOLE = NodeReport("a", GCC, (H100, replace(H100, index=1)), "13.2", 2, 21.4)
# As NCCL 2.30 prints it: the formats of its library, with values.
SOCKET = """a:7:9 [0] NCCL INFO NET/IB : No device found.
a:7:9 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.7<0> [1]eth1:10.1.0.7<0>
a:7:9 [0] NCCL INFO Using network Socket
a:7:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0
"""
INFINIBAND = """a:7 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0
a:7:9 [0] NCCL INFO Using network IB
a:7:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0/GDRDMA
"""
NVLINK = """a:7:9 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.7<0>
a:7:9 [0] NCCL INFO Using network Socket
a:7:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
"""


def test_a_node_that_lacks_nothing() -> None:
    report = replace(WHOLE, inside=Reduced(412.3, "P2P"), across=Reduced(48.0, "IB mlx5_0, mlx5_1"))
    assert report.line() == (
        "a: 2 x NVIDIA H100 80GB HBM3, driver 580.95.05; compiler: gcc 12, Python headers: yes; a "
        "kernel compiled and ran in 21 s; all-reduce of all GPUs of the node: 412 GB/s over "
        "P2P; all-reduce of the nodes: 48 GB/s over IB mlx5_0, mlx5_1; nothing is missing"
    )


MISSING = [
    (dict(compiler=Compiler("", True, "")), "no C compiler (apt-get install gcc python3-dev"),
    (dict(compiler=Compiler("gcc 12", False, "")), "no Python.h in "),
    (dict(compiler=Compiler("gcc 12", True, "x.c:1: error: y")), "does not compile: x.c:1"),
    (dict(gpus=(replace(H100, driver="550.54.15"),)), "driver 550.54.15 is too old for torch's"),
    (dict(shm_free=64 * 2**20), "/dev/shm has 64 MiB free, NCCL wants 1 GiB"),
    (dict(gpus=(H100, replace(H100, index=3, used_mib=70_000))), "GPU 3 in use by others, up to"),
    (dict(apart=28), "no peer to peer in 28 pairs of GPUs"),
    (dict(inside=Reduced(error="no end after 120 s", over="SHM")),
     "the all-reduce of all GPUs of the node failed over SHM: no end after 120 s (docs/gpus.md"),
    (dict(across=Reduced(error="Connect refused", over="Socket docker0")),
     "the all-reduce of the nodes failed over Socket docker0: Connect refused"),
    (dict(errors=("no kernel could be compiled and run: no end after 240 s",)), "no kernel could"),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "said"), MISSING, ids=lambda x: str(x)[:30])
def test_what_is_missing_is_said_with_what_to_do(facts: dict[str, Any], said: str) -> None:
    assert WHOLE.missing() == []
    report = replace(WHOLE, **facts)
    (one,) = report.missing()
    assert one.startswith(said) or said in one
    assert report.line().startswith("a: ") and report.line().endswith(f"; MISSING: {one}")
    assert "\n" not in report.line() and "nothing is missing" not in report.line()


@pytest.mark.parametrize(
    ("driver", "cuda", "old"),
    [("580.95.05", "13.2", False), ("575.57.08", "13.2", True), ("595.10", "13.2", False),
     ("535.1", "12.8", False), ("520.61.05", "12.8", True), ("", "13.2", False),
     ("550.1", "", False)],
)  # fmt: skip
def test_drivers(driver: str, cuda: str, old: bool) -> None:
    assert bool(driver_too_old(driver, cuda)) == old


@pytest.mark.parametrize(
    ("log", "over"),
    [(SOCKET, "Socket eth0, eth1"), (INFINIBAND, "IB mlx5_0, mlx5_1"), (NVLINK, "P2P"),
     (NVLINK.replace("P2P/CUMEM/read", "SHM/direct/direct"), "SHM"),
     ("NCCL INFO Using network AWS Libfabric\n via NET/AWS Libfabric/0", "AWS Libfabric"),
     ("", "")],
)  # fmt: skip
def test_what_nccl_uses(log: str, over: str) -> None:
    assert network(log) == over


def test_a_process_that_hangs_is_ended_with_its_children() -> None:
    """A child that would last for an hour, of a shell that waits for it."""
    ran = run_limited(["sh", "-c", "sleep 3600 & echo $!; wait"], 1.5)
    assert ran.code is None and ran.result is None
    assert ran.reason(1.5) == "no end after 2 s"
    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(int(ran.output))
        wait_for(lambda: not living(child), "the child to end", 60)


def test_reasons() -> None:
    assert Ran(1, "a\nb: NCCL WARN Bootstrap : no socket interface found\nTraceback\n").reason(
        9
    ) == ("Bootstrap : no socket interface found")
    assert Ran(1, "Traceback\nValueError: x\nlast\n").reason(9) == "ValueError: x"
    assert Ran(None, "h NCCL WARN Connect refused\n").reason(9) == (
        "no end after 9 s, Connect refused"
    )
    assert Ran(-9, "").reason(9) == "it ended with -9 and said nothing"
    assert Ran(127, run_limited(["/nowhere/x"], 1).output).reason(9).endswith("'/nowhere/x'")


def test_who_failed_first_is_told() -> None:
    """The others only waited for it."""
    good, late = Ran(0, 'RESULT {"gb_per_s": 5.0}\n'), Ran(None, "")
    assert reduced_of([good, Ran(0, f'{NVLINK}RESULT {{"gb_per_s": 4.0}}')], 9) == Reduced(4, "P2P")
    assert reduced_of([late, Ran(1, "NCCL WARN no P2P"), good], 9).error == "no P2P"
    assert reduced_of([late, good], 9).error == "no end after 9 s"
    assert reduced_of([Ran(1, 'RESULT {"gb_per_s": 5.0}')], 9).error  # it failed after it


def smi(folder: Path, text: str) -> str:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = "echo '0, NVIDIA H100 80GB HBM3, 580.95.05, 3'; echo '1, NVIDIA L4, 580.95.05, [N/A]'"
    assert gpus_of(smi(tmp_path, row)) == (
        (H100, Gpu(1, "NVIDIA L4", "580.95.05", 0)),
        "",
    )
    none, error = gpus_of(smi(tmp_path, "echo 'Driver/library version mismatch'; exit 18"))
    assert none == () and "Driver/library version mismatch (load the driver" in error
    monkeypatch.setattr(gpu_node, "SMI_S", 0.3)
    none, error = gpus_of(smi(tmp_path, "sleep 30"))
    assert none == () and "no end after" in error


def test_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(**result: Any) -> Ran:
        import json

        facts = {"gpus": 8, "apart": 0, "seconds": 3.0, "error": ""} | result
        return Ran(0, f"warning\nRESULT {json.dumps(facts)}\n")

    bare = replace(WHOLE, kernel_s=None, visible=0)
    assert with_kernel(bare, ran()) == replace(bare, kernel_s=3.0, visible=8)
    assert "Failed to find" in with_kernel(bare, ran(error="Failed to find C")).missing()[0]
    assert "no end after 240 s" in with_kernel(bare, Ran(None, "")).missing()[0]
    without = replace(bare, compiler=Compiler("", True, ""))
    (only,) = with_kernel(without, ran(error="Failed to find C compiler")).missing()
    assert only.startswith("no C compiler")  # once, by the one that says what to do
    old = replace(bare, gpus=(replace(H100, driver="570.1"),))
    (only,) = with_kernel(old, ran(error="Found no NVIDIA driver", gpus=0)).missing()
    assert only.startswith("driver 570.1 is too old")


def test_no_gpu_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(gpu_node, "DRIVER", tmp_path / "version")
    line = Node().report().line()
    assert line == f"{socket.gethostname()}: no GPU here; compiler: none, Python headers: yes"
    (tmp_path / "version").touch()  # a driver, and no nvidia-smi: a container without utility
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in Node().report().line()


def played(report: NodeReport, reduced: Reduced, calls: list[Any]) -> Seat:
    """A node that says what it is told to; an exception in place of a report is raised."""

    def call(method: str, *words: Any) -> Callable[[float], Any]:
        def wait(limit_s: float) -> Any:
            assert limit_s >= 1
            if isinstance(report, Exception):
                raise report
            return {"report": report, "address": "tcp://10.0.0.7:5", "reduce": reduced}[method]

        calls.append((method, *words))
        return wait

    return Seat("10.0.0.7", call)


def test_nodes_together() -> None:
    """Two of two GPUs, one that hangs, one whose GPU torch cannot use."""
    calls: list[Any] = []
    fast = Reduced(9.0, "Socket eth0")
    lost: Any = TimeoutError("Get timed out")
    seats = [
        played(WHOLE, fast, calls),
        played(lost, fast, calls),
        played(replace(WHOLE, visible=0, errors=("no kernel",)), fast, calls),
        played(WHOLE, Reduced(error="refused"), calls),
    ]
    reports = examined(seats)
    assert [r.across for r in reports] == [fast, None, None, Reduced(error="refused")]
    assert [r.inside is not None for r in reports] == [True, False, False, True]
    assert reports[1].line() == "10.0.0.7: it does not answer: TimeoutError Get timed out"
    groups = [words[1] for words in calls if words[0] == "reduce"]
    inside = Group("nccl", ("cuda:0", "cuda:1"), 0, 2, "")
    address = "tcp://10.0.0.7:5"
    across = [Group("nccl", ("cuda:0",), rank, 2, address) for rank in (0, 1)]
    assert groups == [inside, inside, *across]


def test_gpus_that_only_ray_knows_of() -> None:
    seat = replace(played(NodeReport("b", GCC), Reduced(), []), gpus=2)
    (report,) = examined([seat])
    assert report.line().endswith(
        "MISSING: Ray counts 2 GPUs here, but there is no driver (install one)"
    )


def test_the_lines_of_a_machine_without_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(Node, "report", lambda self: NodeReport("b", GCC))
    with caplog.at_level("INFO", logger="pipeline"):
        gpus.gpu_lines(load([]))
    assert "b: no GPU here; compiler: gcc 12, Python headers: yes" in caplog.text


@pytest.mark.slow
def test_an_all_reduce_of_processes_and_one_that_nobody_joins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    node = Node()
    reduced = node.reduce(Group("gloo", ("cpu", "cpu"), 0, 2, ""), 100)
    assert reduced.error == "" and reduced.gb_per_s > 0
    alone = node.reduce(Group("gloo", ("cpu",), 0, 2, node.address("127.0.0.1")), 8)
    assert alone.error


def test_an_all_reduce_of_two_actors(ray_cluster: None) -> None:
    """As between two nodes, over gloo: each actor starts its process, the sum is checked in it."""
    import ray

    node = ray.nodes()[0]
    seats = [seat_of(node["NodeID"], "127.0.0.1") for _ in range(2)]
    outcomes = together(seats, "gloo", "cpu", 100)
    assert [one.error for one in outcomes] == ["", ""]
    assert all(one.gb_per_s > 0 for one in outcomes)


@pytest.mark.slow
def test_a_kernel_is_compiled(tmp_path: Path) -> None:
    """On a CPU, by the same process as on a GPU; without a compiler it says so."""
    command = [sys.executable, "-m", "pipeline.doctor.gpu_probe", "kernel", "cpu"]
    paths = {"PYTHONPATH": str(gpu_node.ROOT)}
    result = run_limited(command, 240, paths).result
    assert result is not None and result["error"] == "" and result["gpus"] == 0
    hidden = run_limited(command, 240, paths | {"PATH": str(tmp_path), "CXX": "/nowhere/c++"})
    assert hidden.result is not None and "ompiler" in hidden.result["error"]
    assert os.environ.get("CXX") != "/nowhere/c++"
