"""Where hosts cannot be made, tests are skipped with the reason, and nothing is left of the try."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cluster import hosts

IP = """\
#!/bin/sh
echo "$*" >> {log}
case "$*" in *"{refused}"*) echo "Operation not permitted" >&2; exit 2;; esac
"""


@pytest.mark.skipif(sys.platform != "linux", reason="hosts need Linux")
@pytest.mark.parametrize("refused", ["netns add", "type bridge", "type veth", "--mount-proc"])
def test_a_container_that_refuses(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    for name in ("ip", "unshare", "nsenter", "mount"):
        tool = tmp_path / name
        tool.write_text(IP.format(log=log, refused=refused))
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 0)
    said = hosts.lacking()
    assert refused in said and said.endswith("is refused here: Operation not permitted")
    asked = log.read_text().splitlines()
    made = [line.split()[2] for line in asked if " add " in line]
    assert set(made) <= {line.split()[2] for line in asked if " del " in line}
    monkeypatch.setattr(hosts, "UNSHARE", ())
    for name in ("ip", "unshare"):
        (tmp_path / name).write_text(IP.format(log=log, refused="never"))
    assert hosts.lacking() == ""
