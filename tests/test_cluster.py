"""How Ray's processes are started, without Ray."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from ray._private import services, utils

from pipeline.cluster import own_process_group


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
