"""A job on a test cluster, by `ray job submit`, followed line by line."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.nodes import RAY, ROOT, Cluster

# what a job does not need; small uploads start sooner
EXCLUDES = ("tests", "docs", "benchmarks", ".git")
SUBMITTED = re.compile(r"'(raysubmit_\w+)' submitted|Job submission server address")


@dataclass
class Job:
    """`ray job submit`, which follows the job to its end.

    Attributes:
        process: of the client.
        lines: (seconds since 1970, line) as they came.
    """

    process: subprocess.Popen[str]
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._came = threading.Condition()
        self._over = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._came:
                self.lines.append((time.time(), line.rstrip()))
                self._came.notify_all()
        with self._came:
            self._over = True
            self._came.notify_all()

    def until(self, pattern: str, timeout: float = 600, after: float = 0.0) -> re.Match[str]:
        """The first line that has the pattern and came after a time; waits for it.

        Raises:
            AssertionError: it did not come; with all that was said.
        """
        found: list[re.Match[str]] = []

        def there() -> bool:
            matches = (re.search(pattern, line) for at, line in self.lines if at >= after)
            found.extend(match for match in matches if match)
            return bool(found) or self._over

        with self._came:
            self._came.wait_for(there, timeout)
        assert found, f"no line with {pattern!r}\n{self.text}"
        return found[0]

    def finish(self, timeout: float = 600) -> int:
        """Waits for the end; gives the client's exit code."""
        code = self.process.wait(timeout)
        self._reader.join(60)
        return code

    @property
    def text(self) -> str:
        """All that was said."""
        return "\n".join(line for _, line in self.lines)


def submit(cluster: Cluster, *argv: str, options: tuple[str, ...] = (), **env: str) -> Job:
    """Submits a command of this project to a cluster.

    Args:
        cluster: where.
        argv: from the root of the project.
        options: of `ray job submit`.
        env: variables of the job.
    """
    import json

    runtime: dict[str, Any] = {"working_dir": str(ROOT), "excludes": list(EXCLUDES)}
    if env:
        runtime["env_vars"] = env
    place = cluster.nodes[0].place
    command = [
        *(RAY, "job", "submit", f"--address={cluster.dashboard}"),
        f"--runtime-env-json={json.dumps(runtime)}",
        *options,
        "--",
        *argv,
    ]
    process = subprocess.Popen(
        place.command(*command) if place else command,
        env=cluster.env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Job(process)
