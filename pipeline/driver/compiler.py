"""The C compiler that GPUs need: Triton builds what starts its kernels with it, on each node.

Triton takes `CC`, else gcc, else clang, and the `Python.h` of the Python that runs (triton 3.9,
runtime/build.py). Where one of them is missing, a run fails minutes after its start, with the
traceback of a compiler; so both are tried here first.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 60.0  # for a file of ten lines
SOURCE = """#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "tried"};
PyMODINIT_FUNC PyInit_tried(void) { return PyModule_Create(&module); }
"""
INSTALL = (
    "install gcc and the headers of the Python that runs Ray (apt-get install gcc python3-dev)"
)
# Both use Triton where there is a GPU.
WITHOUT = "train.compile=false train.loss_kernels=eager goes without"


@dataclass(frozen=True)
class Compiler:
    """What was found, and what is wrong with it."""

    name: str  # "gcc 12"; "" where there is none
    headers: bool  # whether Python.h is where it must be
    error: str  # what the compiler said against a small extension; "" where it built one

    @property
    def missing(self) -> str:
        """What keeps Triton from compiling here, in a few words; empty where nothing does."""
        if not self.name:
            return "no C compiler"
        if not self.headers:
            return f"no Python.h in {_include()}"
        return f"{self.name} does not compile: {self.error}" if self.error else ""

    def __str__(self) -> str:
        headers = "yes" if self.headers else "no"
        works = f", but {self.missing}" if self.name and self.headers and self.error else ""
        return f"compiler: {self.name or 'none'}, Python headers: {headers}{works}"


def tried() -> Compiler:
    """Compiles a small extension, as Triton would. Takes some tenths of a second."""
    command = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = (Path(_include()) / "Python.h").is_file()
    if not command or not shutil.which(command):
        return Compiler("", headers, "")
    name = f"{Path(command).name} {_output_of(command, '-dumpversion')[1].split('.')[0]}".strip()
    if not headers:
        return Compiler(name, False, "")
    with tempfile.TemporaryDirectory(prefix="compiler") as folder:
        source, target = Path(folder, "tried.c"), Path(folder, "tried.so")
        source.write_text(SOURCE)
        options = ["-shared", "-fPIC", f"-I{_include()}", "-o", str(target)]
        works, output = _output_of(command, str(source), *options)
    return Compiler(name, headers, "" if works else _first_error(output))


def uncompilable() -> str:
    """What is missing on this node for anything to be compiled for a GPU, as half a sentence with
    the name of the node; empty where nothing is.
    """
    missing = tried().missing
    return f"node {socket.gethostname()}: {missing}" if missing else ""


def _include() -> str:
    # Debian's own scheme has another folder, in which no headers are
    scheme = sysconfig.get_default_scheme()
    return sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]


def _output_of(command: str, *arguments: str) -> tuple[bool, str]:
    try:
        done = subprocess.run(
            [command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return False, f"no end after {LIMIT_S:.0f} s"
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stdout.strip()


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line] or output.splitlines()
    return lines[0].strip()[:200] if lines else "it ended without a word"
