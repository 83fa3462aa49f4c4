"""Hosts in network namespaces: own address, own processes, own /tmp/ray and home, a cable to pull.

Each host is a network, mount, process and UTS namespace on one bridge. It needs root and
`ip netns`; `hosts()` skips the test with the reason where it lacks them.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import ROOT, end_with_parent, wait_for

HOME = Path("/root")
UNSHARE = (
    *("unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--mount-proc"),
    *("--kill-child", "--propagation", "private"),
)
# PID 1 of a host: mounts what is the host's own, starts sshd if asked to, reaps orphans.
INIT = """\
set -e
for kept in $KEEP; do mkdir -p "$OWN/root$kept" "$kept"; done
for kept in $KEEP; do mount --bind "$kept" "$OWN/root$kept"; done
if [ -n "$KEEP" ]; then cp -a "$OWN/home/." "$OWN/root/root/"; HOME_OF="$OWN/root/root"
else HOME_OF="$OWN/home"; fi
mkdir -p /tmp/ray
mount --rbind "$HOME_OF" /root
mount --bind "$OWN/ray" /tmp/ray
hostname "$NAME"
if [ -n "$SSHD" ]; then mkdir -p /run/sshd; "$SSHD" -f "$OWN/sshd_config" -E "$OWN/sshd.log"; fi
touch "$OWN/up"
while :; do sleep 3600 & wait $!; done
"""


class Host:
    """One host.

    Attributes:
        name: host name, also of its network namespace.
        address: its IP address.
        folder: on this machine: `home/` is its `/root`, `ray/` its `/tmp/ray`.
        key: of ssh, for root; None without sshd.
    """

    def __init__(self, net: Network, number: int) -> None:
        self.net, self.number = net, number
        self.name = f"{net.name}-{number}"
        self.cable = f"{net.name}v{number}"
        self.address = str(net.subnet[10 + number])
        self.folder = net.folder / f"h{number}"
        self.key = net.key
        self.init: subprocess.Popen[bytes] | None = None
        for part in ("home/.ssh", "ray", "root"):
            (self.folder / part).mkdir(parents=True)
        _ip("netns", "add", self.name)
        _ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self.cable, "master", net.name, "up")
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", self.name, "link", "set", device, "up")
        _ip("-n", self.name, "route", "add", "default", "via", str(net.subnet[1]))
        if net.key:
            self._allow_ssh(net.key)

    def boot(self) -> None:
        """Switches the host on: at first, or again after `kill`, with an empty /tmp/ray."""
        assert self.init is None or self.init.poll() is not None, f"{self.name} is up"
        for left in (self.folder / "ray").iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        (self.folder / "up").unlink(missing_ok=True)
        environment = os.environ | {
            "OWN": str(self.folder),
            "NAME": self.name,
            "KEEP": " ".join(map(str, _kept())),
            "SSHD": (shutil.which("sshd") or "/usr/sbin/sshd") if self.key else "",
        }
        with (self.folder / "init.log").open("ab") as log:
            self.init = subprocess.Popen(
                [
                    *("ip", "netns", "exec", self.name),
                    *UNSHARE,
                    *("bash", "-c", INIT),
                ],
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,  # the host's processes die with it
            )
        wait_for(
            lambda: (self.folder / "up").exists(),
            f"host {self.name} to boot",
            timeout=60,
            explain=lambda: (self.folder / "init.log").read_text(),
        )

    def kill(self) -> None:
        """Power off: every process of the host dies at once. Does nothing a second time."""
        if self.init is None or self.init.poll() is not None:
            return
        os.kill(self._pid(), signal.SIGKILL)  # the kernel ends the namespace's processes with it
        self.init.wait()

    def command(self, *argv: str) -> list[str]:
        """A command line of this machine that runs `argv` on the host."""
        inside = ("--mount", "--net", "--pid", "--uts", "--ipc", "--wd=/")
        return ["nsenter", f"--target={self._pid()}", *inside, *argv]

    def run(self, *argv: str, timeout: float = 600, **options: Any) -> Any:
        """Runs a command on the host to its end; gives a `subprocess.CompletedProcess` of text."""
        return subprocess.run(
            self.command(*argv), capture_output=True, text=True, timeout=timeout, **options
        )

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[Any]:
        """Starts a command on the host; `kill` ends it."""
        return subprocess.Popen(self.command(*argv), **options)

    def cut(self) -> None:
        """Pulls the cable: packets in both directions are lost without a word."""
        _ip("link", "set", self.cable, "down")

    def mend(self) -> None:
        """Puts the cable back."""
        _ip("link", "set", self.cable, "up")

    def remove(self) -> None:
        """Ends the host for good."""
        self.kill()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)

    def _pid(self) -> int:
        """Of the host's PID 1, as this machine counts."""
        assert self.init is not None and self.init.poll() is None, f"{self.name} is off"
        unshare = self.init.pid  # `ip netns exec` has become `unshare`
        children = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        return int(children[0])

    def _allow_ssh(self, key: Path) -> None:
        keys = self.folder / "authorized_keys"
        shutil.copy(key.with_suffix(".pub"), keys)
        binaries = Path(sys.executable).parent
        (self.folder / "home" / ".bashrc").write_text(f"export PATH={binaries}:$PATH\n")
        (self.folder / "home" / ".bash_profile").write_text(". ~/.bashrc\n")
        settings = {
            "ListenAddress": self.address,
            "HostKey": self.net.folder / "hostkey",
            "PidFile": self.folder / "sshd.pid",
            "PermitRootLogin": "yes",
            "PasswordAuthentication": "no",
            "StrictModes": "no",
            "UsePAM": "no",
            "AuthorizedKeysFile": keys,
            "Subsystem": "sftp internal-sftp",
            "MaxStartups": "50",
        }
        lines = "".join(f"{name} {value}\n" for name, value in settings.items())
        (self.folder / "sshd_config").write_text(lines)


class Network:
    """A bridge and the hosts on it."""

    def __init__(self, folder: Path, ssh: bool) -> None:
        self.folder = folder
        self.name = f"rd{secrets.token_hex(3)}"  # device names have 15 characters at most
        self.subnet = _free_subnet()
        self.key = folder / "key" if ssh else None
        self.hosts: list[Host] = []
        for name in ("key", "hostkey") if ssh else ():
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        # without the delay a cable that is put back would stay dead for 15 s more
        _ip("link", "add", self.name, "type", "bridge", "stp_state", "0", "forward_delay", "0")
        _ip("addr", "add", f"{self.subnet[1]}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")

    def add(self) -> Host:
        """One more host, switched on."""
        host = Host(self, len(self.hosts))
        self.hosts.append(host)
        host.boot()
        return host

    def close(self) -> None:
        """Removes hosts, bridge and folders."""
        for host in self.hosts:
            host.remove()
        subprocess.run(["ip", "link", "del", self.name], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def hosts(count: int, *, ssh: bool = False) -> Iterator[list[Host]]:
    """So many hosts, or the test is skipped and says why. All of them are gone at the end."""
    if reason := lacking(ssh):
        pytest.skip(reason)
    net = Network(Path(tempfile.mkdtemp(prefix="rh", dir="/tmp")), ssh)
    try:
        yield [net.add() for _ in range(count)]
    finally:
        net.close()


def lacking(ssh: bool = False) -> str:
    """Why there can be no hosts here; empty where there can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = ["ip", "unshare", "nsenter", "mount", "bash"]
    paths = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    tools += ["sshd", "ssh", "ssh-keygen"] if ssh else []
    if missing := [tool for tool in tools if not shutil.which(tool, path=paths)]:
        return f"network namespaces need {', '.join(missing)}, not found here"
    probe = f"rdprobe{secrets.token_hex(3)}"  # 13 characters; devices may have 15
    veth = ("link", "add", f"{probe}v", "type", "veth", "peer", "name", "eth0", "netns", probe)
    tries = (
        ("ip", "netns", "add", probe),
        ("ip", "link", "add", probe, "type", "bridge"),
        ("ip", *veth),
        ("ip", "netns", "exec", probe, *UNSHARE, "true"),
    )
    try:
        for command in tries:  # all that a host needs: a container's root may lack some of it
            tried = subprocess.run(command, capture_output=True, text=True)
            if tried.returncode:
                return f"`{' '.join(command)}` is refused here: {tried.stderr.strip()}"
    finally:
        for device in (f"{probe}v", probe):
            subprocess.run(["ip", "link", "del", device], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", probe], check=False, capture_output=True)
    return ""


def _kept() -> list[Path]:
    """What must be seen on every host although it is below /root, which is the host's own."""
    wanted = [Path(sys.prefix), Path(sys.base_prefix), ROOT]
    return sorted({path for path in wanted if path.is_relative_to(HOME)})


def _free_subnet() -> ipaddress.IPv4Network:
    """A /24 of 10.64.0.0/10 that no device of this machine has."""
    shown = json.loads(_call("ip", "-json", "-4", "route", "show", "table", "all"))
    routes = [route["dst"] for route in shown if "/" in route.get("dst", "")]
    taken = [ipaddress.ip_network(route, strict=False) for route in routes]
    while True:
        mine = ipaddress.ip_network(
            f"10.{64 + secrets.randbelow(64)}.{secrets.randbelow(256)}.0/24"
        )
        assert isinstance(mine, ipaddress.IPv4Network)
        if not any(mine.overlaps(other) for other in taken):
            return mine


def _ip(*argv: str) -> None:
    _call("ip", *argv)


def _call(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr.strip()}"
    return done.stdout
