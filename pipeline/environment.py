"""What a job needs of its surroundings: UTF-8, a way to loopback, a user, a place for sockets.

Proxies, containers with any user id and old locales are common, and no reason to stop.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

log = logging.getLogger("pipeline")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Ray's longest socket below its folder, and how many bytes the path of a socket may have
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store_1"
SOCKET_BYTES = 107 if sys.platform == "linux" else 103
# What training workers on GPUs get, before CUDA starts, unless the user set it.
# torch 2.15 reads PYTORCH_ALLOC_CONF where PYTORCH_CUDA_ALLOC_CONF is not set.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# What training workers on CPUs get, unless the user set it: the largest sizes that glibc allows.
KEPT_MEMORY = ":".join(
    (
        "glibc.malloc.hugetlb=1",  # large pages where the system gives them on request
        "glibc.malloc.mmap_threshold=33554432",
        "glibc.malloc.trim_threshold=17179869184",
    )
)
COMPILE_PROCESSES = 32  # torch's own limit for one worker


def prefer_utf8() -> None:
    """Starts this process again in Python's UTF-8 mode where the locale has another encoding.

    Names of files and folders cannot be written as they are in it. What cannot be printed is
    printed as an escape.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # for all processes that are started from here
        with contextlib.suppress(OSError):
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # replaced, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def bypass_proxies() -> None:
    """Adds loopback to the addresses that are reached without a proxy, where there is one.

    MLflow's local server, and whatever else runs on this machine, is not behind a proxy.
    """
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    if not any(name.lower() in proxies and value for name, value in os.environ.items()):
        return
    either = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in (os.environ.get(name) or either).split(",") if host.strip()]
        known = {host.strip() for host in hosts}
        if "*" not in known:
            os.environ[name] = ",".join([*hosts, *(h for h in LOOPBACK if h not in known)])


def name_user() -> None:
    """Gives a user id that no list of users has a name, which many libraries ask for."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"


def has_home() -> bool:
    """Whether this user has a home in which files can be made."""
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and a user id without a name
        return False
    return home != Path("/") and os.access(home, os.W_OK)


def own_token() -> None:
    """Gives a Ray that is started here a token in the environment where it cannot keep one at home.

    Ray makes one for each new cluster, in ~/.ray/auth_token.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or has_home():
        return
    with contextlib.suppress(RuntimeError, OSError):
        if (Path.home() / ".ray" / "auth_token").read_text().strip():
            return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def socket_folder() -> str:
    """A new folder for a Ray that is started here: in TMPDIR if its path is short enough."""
    chosen = os.environ.get("TMPDIR")
    plain = Path("/tmp") if Path("/tmp").is_dir() else None
    if chosen and Path(chosen).absolute() != plain:
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="rd", dir=Path(chosen).absolute()))
            if len(os.fsencode(f"{folder}{SOCKET}")) <= SOCKET_BYTES:
                return str(folder)
            folder.rmdir()
        log.info(
            "Ray's files are in %s: TMPDIR=%s cannot be written, or is longer than the %d bytes "
            "that paths of sockets leave",
            plain or "the system's folder for temporary files",
            chosen,
            SOCKET_BYTES - len(SOCKET) - len("/rd12345678"),
        )
    return tempfile.mkdtemp(prefix="rd", dir=plain)


def worker_variables(device: str, compiles: bool, threads: int) -> dict[str, str]:
    """Variables of training workers. What is set in this process goes to them as it is.

    * Segments of the allocator grow where they are: memory that is given back in other sizes than
      it is asked for next leaves no holes.
    * On CPUs, memory of a step that is freed stays with the process, in large pages: else each step
      gets its activations from the system again, page by page. glibc reads it, others ignore it.
    * Each worker of a node compiles, all at the same time, with processes of its own: as many as
      it has CPUs, where torch would start up to 32 for each.

    Args:
        device: "cuda" or "cpu".
        compiles: whether the networks are compiled.
        threads: CPUs of a node for each of its workers.
    """
    variables: dict[str, str] = {}
    if device == "cuda":
        own = [name for name in ALLOCATOR if name in os.environ]
        variables |= {name: os.environ[name] for name in own}
        if not own:
            variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    else:
        variables["GLIBC_TUNABLES"] = os.environ.get("GLIBC_TUNABLES", KEPT_MEMORY)
    if compiles:
        processes = str(max(1, min(COMPILE_PROCESSES, threads)))
        name = "TORCHINDUCTOR_COMPILE_THREADS"
        variables[name] = os.environ.get(name, processes)
        if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
            variables["TORCHINDUCTOR_CACHE_DIR"] = folder
    return variables


def uploaded() -> bool:
    """Whether this is a submitted job, working in a copy of the project that Ray made for it and
    deletes some time after it.
    """
    return bool(_job_config().get("runtime_env", {}).get("working_dir"))


def submission() -> dict[str, str]:
    """The id and the metadata of a submitted job, named `ray.…`; empty for other jobs."""
    metadata = _job_config().get("metadata", {})
    known = {str(name).removeprefix("job_"): str(value) for name, value in metadata.items()}
    return {f"ray.{name}": value for name, value in known.items() if name != "name"}


def _job_config() -> dict[str, Any]:
    """What `ray job submit` gives the processes that it starts."""
    config: dict[str, Any] = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return config
