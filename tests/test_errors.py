"""What is said of errors that come from Ray."""

from __future__ import annotations

import ray

from pipeline.errors import last_line


def test_the_last_line_says_what_happened() -> None:
    assert last_line(ValueError("a\n  b\n\n")) == "b"
    assert last_line(ValueError()) == "ValueError"


def test_full_stores_and_disks_in_one_sentence() -> None:
    full = ray.exceptions.OutOfDiskError("of task 7")
    assert "disk" in last_line(full) and "--object-spilling-directory" in last_line(full)
    full = ray.exceptions.ObjectStoreFullError("of task 7")
    assert "--object-store-memory" in last_line(full)
    wrapped = RuntimeError(f"worker failed:\n{ray.exceptions.OutOfDiskError('x')}\nlast words")
    assert "disk" in last_line(wrapped) and "\n" not in last_line(wrapped)
