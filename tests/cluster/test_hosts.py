"""The hosts that other tests build clusters of: apart from each other, reachable, cut, gone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, hosts

pytestmark = pytest.mark.cluster


def reaches(one: Host, other: Host, wait_s: int = 30) -> bool:
    """Whether a datagram comes through within so long, by a socket of each host's own."""
    listen = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
        f"s.bind(('{other.address}', 7000)); s.settimeout({wait_s}); print('ready', flush=True); "
        "print(s.recv(9).decode())"
    )
    listener = other.start(
        "python3", "-c", listen, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert listener.stdout and listener.stdout.readline() == "ready\n"
    send = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "import time\n"
        "for _ in range(5):\n"
        "    try: s.sendto(b'hello', ('" + other.address + "', 7000))\n"
        "    except OSError: pass\n"
        "    time.sleep(0.2)\n"
    )
    assert one.run("python3", "-c", send).returncode == 0
    said = listener.stdout.read()
    listener.wait()
    return said == "hello\n"


def test_hosts_are_apart_and_a_cable_can_be_pulled() -> None:
    with hosts(2) as (a, b):
        names = [host.run("hostname").stdout.strip() for host in (a, b)]
        assert names == [a.name, b.name] and len(set(names)) == 2
        a.run("bash", "-c", "echo mine > /tmp/ray/note; echo mine > /root/note")
        assert b.run("ls", "/tmp/ray", "/root/note").stdout.strip() == "/tmp/ray:"
        assert "note" not in {path.name for path in Path("/root").iterdir()}
        assert reaches(a, b)
        b.cut()
        assert not reaches(a, b, wait_s=3)
        b.mend()
        assert reaches(a, b)
        sleeper = a.start("sleep", "600")
        a.kill()
        assert sleeper.wait(timeout=60) != 0
        a.boot()
        assert reaches(b, a)
        left = [a.folder, Path("/run/netns") / a.name, Path("/sys/class/net") / a.net.name]
        assert all(path.exists() for path in left)
    assert not any(path.exists() for path in left)


def test_ssh_into_a_host() -> None:
    with hosts(1, ssh=True) as (host,):
        assert host.key is not None
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        shown = subprocess.run(
            ["ssh", "-q", "-i", str(host.key), *options, f"root@{host.address}", "hostname; id -u"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert shown.stdout.split() == [host.name, "0"], shown.stderr
