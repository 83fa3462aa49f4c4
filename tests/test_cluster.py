"""How Ray's processes are started, without Ray."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from ray._private import services, utils
from ray.exceptions import AuthenticationError, RaySystemError

from pipeline.cluster import joined, own_process_group
from pipeline.config import Resources
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
