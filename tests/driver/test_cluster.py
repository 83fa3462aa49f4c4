"""How Ray's processes are started, without Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private import services, utils
from ray.exceptions import AuthenticationError, RaySystemError

from pipeline.config.run import Resources
from pipeline.driver.cluster import TRIES, joined
from pipeline.driver.ray_internals import own_process_group
from pipeline.errors import PipelineError


@pytest.mark.parametrize("kernel_ends_them", [True, None])
def test_processes_leave_the_group_only_where_the_kernel_ends_them_with_us(
    monkeypatch: pytest.MonkeyPatch, kernel_ends_them: bool | None
) -> None:
    """On macOS Ray's reaper ends them, which finds them by their process group."""
    monkeypatch.setattr(utils, "detect_fate_sharing_support", lambda: kernel_ends_them)
    plain = services.ConsolePopen
    code = "import os; print(os.getpgid(0))"
    with own_process_group():
        started = services.ConsolePopen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    group = int(started.communicate()[0])
    assert (group == started.pid) == bool(kernel_ends_them)
    assert (group == os.getpgid(0)) != bool(kernel_ends_them)
    assert services.ConsolePopen is plain


@pytest.mark.parametrize(
    ("error", "what", "hint"),
    [
        (AuthenticationError("InvalidAuthToken: Authentication token is missing"), "wants a token",
         "RAY_AUTH_TOKEN_PATH"),
        (RuntimeError("InvalidAuthToken: Authentication token is incorrect"), "wants a token",
         "RAY_AUTH_TOKEN_PATH"),
        (ConnectionError("Could not reach GCS"), "no Ray cluster answers", "unset RAY_ADDRESS"),
        (RaySystemError("The node died"), "no Ray cluster answers", "unset RAY_ADDRESS"),
    ],
)  # fmt: skip
def test_a_cluster_that_refuses_is_one_sentence(
    error: Exception, what: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(PipelineError, match=what) as caught, joined(Resources()):
        pass
    assert "RAY_ADDRESS=head:6379" in caught.value.what
    assert hint in caught.value.hint and "\n" not in caught.value.what


def test_a_cluster_that_wants_a_token_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray.init` only says that it cannot connect; who asks the cluster itself hears why."""
    import ray

    def refuse(**options: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster")

    def ask(address: str) -> None:
        raise AuthenticationError("InvalidAuthToken: Authentication token is missing")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr("ray._raylet.GcsClient", ask)
    with socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        with pytest.raises(PipelineError, match="wants a token"), joined(Resources()):
            pass


@pytest.mark.parametrize("ends", [1, TRIES])
def test_ray_is_started_again_where_its_raylet_ends(
    ends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes are ended before; where it ends each time, that is one sentence."""
    import ray

    raylet = tmp_path / "raylet"
    raylet.write_text("#!/bin/sh\nexec sleep $1\n")
    raylet.chmod(0o700)
    helpers: list[subprocess.Popen[bytes]] = []

    def init(**options: object) -> None:
        number = len(helpers)
        helpers.append(services.ConsolePopen(["sleep", "100"]))
        helpers.append(services.ConsolePopen([str(raylet), "0" if number < 2 * ends else "100"]))
        if number < 2 * ends:
            helpers[-1].wait()
        services.get_node("127.0.0.1:1", "id")

    looks = 0

    def not_there_yet(*arguments: object) -> dict[str, object]:
        nonlocal looks
        looks += 1
        if looks < 2:
            raise RuntimeError("no such node")
        return {}

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(services, "get_node", not_there_yet)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        if ends == TRIES:
            sentence = f"raylet ended .* {TRIES} times"
            with pytest.raises(PipelineError, match=sentence), joined(Resources()):
                pass
            assert looks == 0, "a raylet that has ended is not waited for"
        else:
            with joined(Resources()):
                assert looks == 2, "a raylet that is not ready is waited for"
                assert helpers[-1].poll() is helpers[-2].poll() is None
        assert all(p.poll() is not None for p in helpers[: 2 * ends])
        assert len(helpers) == 2 * min(ends + 1, TRIES)
    finally:
        for process in helpers:
            process.kill()
            process.wait()
    assert services.get_node is not_there_yet
