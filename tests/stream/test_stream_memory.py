"""A stream that is larger than its object store: `benchmarks/sizes.py`, small, in its own Ray."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STORE_MB = 150


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_object_store_is_not_spilled_by_a_long_stream(shared: Path) -> None:
    command = [
        *(sys.executable, ROOT / "benchmarks" / "sizes.py", "--only", "endless"),
        *("--photos", shared / "data" / "imagenet-samples", "--thumbnails", "1024"),
        *("--seconds", "60", "--small-store-mb", str(STORE_MB)),
    ]
    shown = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    match = re.search(r"(\d+) MiB of crops; object store (\d+), spilled (\d+);", shown)
    assert match, shown
    sent, store, spilled = map(int, match.groups())
    assert sent > 3 * STORE_MB, "too slow a machine to tell"
    assert store <= STORE_MB
    assert spilled == 0
