"""What is said of errors that come from Ray."""

from __future__ import annotations

import ray

from pipeline.errors import last_line, shortened
from pipeline.stages.pretrain import digest_shown


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


def test_what_is_left_out_of_a_text_is_told() -> None:
    assert shortened("x" * 200) == "x" * 200
    assert shortened("x" * 201) == "x" * 199 + "…"
    assert digest_shown("not curated yet") == "not curated yet"
    assert digest_shown("0123456789abcdef01") == "0123456789abcd…"
