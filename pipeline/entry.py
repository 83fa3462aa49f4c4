"""Where a job file enters: says in a sentence that packages are missing, or runs the command."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("numpy", "pyarrow", "pydantic", "yaml", "torch", "ray")


def command(name: str) -> None:
    """Runs a command of `pipeline.commands` with the process's arguments.

    Args:
        name: of the command.

    Raises:
        SystemExit: 2 where this Python lacks packages, or as `pipeline.job.command`.
    """
    if lacking := [package for package in NEEDED if find_spec(package) is None]:
        sys.stderr.write(
            f"error: {sys.executable} lacks packages: {', '.join(lacking)}\n"
            "  source .venv/bin/activate, or make demo, which makes that environment first\n"
        )
        sys.exit(2)
    from pipeline import job

    job.command(name)
