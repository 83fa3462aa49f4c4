"""A file system of its own, so that filling it harms nobody."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, mib: int) -> Iterator[Path]:
    """Mounts one of that many MiB at `place`; the test is skipped where that is refused."""
    place.mkdir(parents=True)
    if not shutil.which("mount"):
        pytest.skip("needs mount, to make a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "raydino", str(place)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
