"""The run folder: its name stays inside, its lock harms nobody, its marks may be damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.storage.run_folder import RunFolder

NAMES = [
    "", " ", ".", "..", "../up", "a/..", "a/../../up", "./a", "a//b", "a/", "/elsewhere", "~/a",
    "~", "a\nb", "a\x1b[31mb", "a\0b", "a\tb", " a", "a ", "x" * 256, "é" * 128,
    f"a/{'x' * 300}", "\ud800", "a\u202eb",
]  # fmt: skip


def test_names_that_are_no_names_of_runs(tmp_path: Path) -> None:
    for name in NAMES:
        for folder in (str(tmp_path), "s3://bucket/runs"):
            with pytest.raises(PipelineError, match=r"^run.name=") as caught:
                RunFolder.of(folder, name)
            said = caught.value.what
            assert said.isprintable() and len(said) < 300 and caught.value.hint, ascii(name)
    for name in ("a?b", "a#b", "a%2e"):
        with pytest.raises(PipelineError, match="something else in a URI"):
            RunFolder.of("s3://bucket/runs", name)
    for name in ("vits14", "a b", "x" * 255, "exp/1", "日本", "..a", "a..b", "a?b"):
        assert RunFolder.of(str(tmp_path), name).path == tmp_path / name


def refused(folder: RunFolder) -> str:
    with pytest.raises(PipelineError) as caught, folder.locked():
        raise AssertionError("it is locked")
    assert "\n" not in caught.value.what and caught.value.hint
    return caught.value.what


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder in ("/proc/none", f"{tmp_path}/file", f"{tmp_path}/file/below", f"{tmp_path}/loop"):
        assert "cannot be made" in refused(RunFolder.of(folder, "n"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "n").write_text("a file")
    assert "File exists" in refused(RunFolder.of(f"{tmp_path}/runs", "n"))
    assert "too long" in refused(RunFolder.of(f"{tmp_path}/{'/'.join(['x' * 200] * 30)}", "n"))
    if os.getuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "Permission denied" in refused(RunFolder.of(f"{tmp_path}/closed", "n"))


def test_the_lock_leaves_what_has_its_name(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "n")
    (tmp_path / "n").mkdir()
    (tmp_path / "thesis.tex").write_text("mine")
    lock = tmp_path / "n" / ".job.lock"
    lock.symlink_to(tmp_path / "thesis.tex")
    assert "cannot be locked" in refused(folder)
    lock.unlink()
    lock.mkdir()
    assert "cannot be locked" in refused(folder)
    lock.rmdir()
    lock.write_text("mine")
    with folder.locked():
        assert "another job is working" in refused(folder)
    assert lock.read_text() == (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"key": "k"}',
        '{"key": "k", "result": 5}',
        '"x"',
        "\x00",
        "[" * 100_000,
    ],
)
def test_a_damaged_mark_is_none(tmp_path: Path, text: str) -> None:
    folder = RunFolder.of(str(tmp_path), "n")
    folder.mark_done("pack", "k", {"images": 5})
    assert folder.done("pack", "k") == folder.last("pack") == {"images": 5}
    assert folder.done("pack", "other") is None
    (folder.stage("pack") / "_done.json").write_text(text)
    assert folder.done("pack", "k") is None
    assert folder.last("pack") == {}
