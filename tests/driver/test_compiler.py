"""The C compiler: found, missing, without headers, broken; each with a real one or none."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from pipeline.driver import compiler
from pipeline.driver.compiler import Compiler, tried, uncompilable

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc"), reason="needs gcc"
)


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_it_compiles_here() -> None:
    here = tried()
    assert here.missing == "" and here.headers
    assert here.name.startswith("gcc ") and here.name.split()[1].isdigit()
    assert str(here) == f"compiler: {here.name}, Python headers: yes"
    assert uncompilable() == ""


def test_none_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert str(tried()) == "compiler: none, Python headers: yes"
    assert uncompilable() == f"node {socket.gethostname()}: no C compiler"


def test_the_one_that_is_chosen_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert tried().missing == "no C compiler"


def test_no_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler, "_include", lambda: str(tmp_path))
    assert tried().missing == f"no Python.h in {tmp_path}"
    assert str(tried()).endswith("Python headers: no")


def test_what_a_broken_one_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A header that does not compile: gcc's own first error is told."""
    (tmp_path / "Python.h").write_text("#error no libc here\n")
    monkeypatch.setattr(compiler, "_include", lambda: str(tmp_path))
    assert "does not compile" in tried().missing and "no libc here" in tried().missing


def test_one_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(
        "CC", script(tmp_path / "cc", 'case "$1" in -d*) echo 9;; *) exec sleep 60; esac')
    )
    monkeypatch.setattr(compiler, "LIMIT_S", 1.5)
    assert tried().missing == "cc 9 does not compile: no end after 2 s"


def test_a_compiler_that_works_misses_nothing() -> None:
    assert Compiler("gcc 12", True, "").missing == ""
