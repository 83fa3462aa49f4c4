"""Tasks on Ray that write files, each with an account, so that a rerun goes on.

A task reads files, writes files (each whole or not at all) and returns an account of what it did.
Its account is written last, so a task is finished when its account is there. A step that was killed
goes on with what is missing, and a finished one is not run again as long as its key stays the same.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from pipeline.errors import DataError, PipelineError
from pipeline.heartbeat import doing, now
from pipeline.storage.places import delete_file, file_info, list_files, resolve_uri
from pipeline.storage.transfer import read_mark, write_bytes_atomic
from pipeline.uri import join

log = logging.getLogger("pipeline.curate")

RETRIES = 3  # of a task whose worker was killed; errors of the task itself are not tried again
AHEAD = 2  # tasks that wait for each CPU, so that none is idle and few are lost

# What tasks write, in the folder of their step
_NAME = (
    r"([\w-]+(\.closest|\.counts|\.spare)?|[^/]+-\d{5,}(-\d{5})?)"  # sets may be called anything
)
_TABLE = re.compile(
    rf"((rows|vectors|queries|pairs|requests|members|visitors)/)?(b\d{{4}}/)?{_NAME}\.parquet"
)
_WRITTEN = re.compile(
    rf"([\w-]+/)*((_key|_accounts|fit)\.json|_tasks/{_NAME}\.json|{_NAME}\.parquet)"
)

Account = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One call of a step's function.

    Attributes:
        name: of its account; what the files it writes should be called too.
        arguments: positional, after the step's folder; pickled, so small.
        key: of the step.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    key: str = ""


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a task."""

    cpus: float = 1.0
    gpus: float = 0.0


def run_tasks(
    folder: str,
    step: str,
    key: str,
    tasks: Sequence[Task],
    function: Callable[..., Account],
    resources: Resources,
) -> tuple[list[Account], int]:
    """Runs the tasks of a step that are not finished yet.

    Args:
        folder: of the step; files that were written under another key are taken away first.
        step: its name, for messages.
        key: of all that the files depend on.
        tasks: with unique names.
        function: `function(folder, *arguments)` writes its files below `folder` and returns its
            account, JSON-like. It must give the same files whenever it is called.
        resources: of a task.

    Returns:
        The accounts, in the order of the tasks, and how many of these were finished before.

    Raises:
        PipelineError: what a task said; the others are cancelled.
    """
    done = finished(folder)[1] if key_in(folder) == key else _emptied(folder, key)
    missing = [replace(task, key=key) for task in tasks if task.name not in done]
    reused = len(tasks) - len(missing)
    if done and missing:
        log.info("%s: %d of %d tasks were finished before", step, len(done), len(tasks))
    if missing:
        with doing(f"curate: {step}, {len(done)} of {len(tasks)} tasks"):
            for name, account in _run(folder, missing, function, resources, step, len(tasks)):
                done[name] = account
        if len(tasks) > 1:  # one file instead of many, for the next start
            _write(folder, "_accounts.json", {"key": key, "accounts": done})
    return [done[task.name] for task in tasks], reused


def key_in(folder: str) -> str:
    """The key that a step's folder was filled under; empty: there is none."""
    fs, path = resolve_uri(folder)
    return str(read_mark(fs, f"{path}/_key.json").get("key", ""))


def finished(folder: str) -> tuple[str, dict[str, Account]]:
    """The key of a step's folder, and accounts of its finished tasks by name."""
    fs, path = resolve_uri(folder)
    key = key_in(folder)
    whole = read_mark(fs, f"{path}/_accounts.json")
    if whole.get("key") == key and isinstance(whole.get("accounts"), dict):
        return key, dict(whole["accounts"])
    accounts = (read_mark(fs, place) for place in _account_files(fs, path))
    # A task of a driver that was killed may still end, under the key that its step had then.
    return key, {account["_name"]: account for account in accounts if account.get("_key") == key}


def _emptied(folder: str, key: str) -> dict[str, Account]:
    """Nothing: what was written under another key is gone, and the folder has this one."""
    fs, path = resolve_uri(folder)
    if file_info(fs, f"{path}/_key.json").is_file:
        empty_step(folder, step_files(folder))
    _write(folder, "_key.json", {"key": key})
    return {}


def step_files(folder: str) -> list[str]:
    """The tables that a step has written to its folder, by their names: files of others, and steps
    with folders inside this one, are not in it.
    """
    fs, path = resolve_uri(folder)
    paths = [str(info.path) for info in list_files(fs, path)]
    return [name for name in paths if _TABLE.fullmatch(name[len(path) :].lstrip("/"))]


def empty_step(folder: str, files: Sequence[str]) -> None:
    """Takes away a step's accounts and some of its files; what others have put there stays.

    Accounts go first, so no task counts as finished whose files are gone. The key goes last: where
    this is killed, the next start sees another key, or no account, and goes on with it.
    """
    fs, path = resolve_uri(folder)
    accounts = (f"{path}/_accounts.json", *_account_files(fs, path))
    for name in (*accounts, *files, f"{path}/_key.json"):
        delete_file(fs, name)
    if isinstance(fs, pafs.LocalFileSystem):
        for place in sorted({f"{path}/_tasks", path, *(f.rpartition("/")[0] for f in files)}):
            with contextlib.suppress(OSError):  # not empty
                Path(place).rmdir()


def remove_steps(fs: pafs.FileSystem, path: str) -> None:
    """Takes away folders of steps, by the names of the files in them; files of others stay."""
    for info in list_files(fs, path):
        if _WRITTEN.fullmatch(info.path[len(path) :].lstrip("/")):
            delete_file(fs, info.path)
    if isinstance(fs, pafs.LocalFileSystem):
        for place, _, _ in os.walk(path, topdown=False):
            with contextlib.suppress(OSError):  # not empty
                Path(place).rmdir()


def _account_files(fs: pafs.FileSystem, path: str) -> list[str]:
    """Those of single tasks; none where no task has finished."""
    infos = list_files(fs, f"{path}/_tasks", recursive=False)
    return [info.path for info in infos if info.extension == "json"]


def _write(folder: str, name: str, value: Any) -> None:
    fs, path = resolve_uri(folder)
    write_bytes_atomic(json.dumps(value).encode(), fs, f"{path}/{name}")


def _run(
    folder: str,
    tasks: Sequence[Task],
    function: Callable[..., Account],
    resources: Resources,
    step: str,
    total: int,
) -> Any:
    import ray

    cpus = resources.cpus
    threads = str(max(1, int(cpus)))
    variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    remote = ray.remote(_task).options(
        num_cpus=cpus,
        num_gpus=resources.gpus,
        max_retries=RETRIES,
        runtime_env={"env_vars": variables},
    )
    room = int(ray.cluster_resources().get("CPU", 1) / cpus) if cpus else len(tasks)
    most = min(AHEAD * max(1, room), len(tasks))
    shared = ray.put(function)  # with what all tasks are given: once, not with each of them
    waiting = list(reversed(tasks))
    running: dict[Any, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < most:
                task = waiting.pop()
                running[remote.remote(folder, task, shared)] = task.name
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                name = running.pop(reference)
                yield name, _account(ray.get(reference))
            left = len(waiting) + len(running)
            now(f"curate: {step}, {total - left} of {total} tasks")
    finally:
        for reference in running:
            ray.cancel(reference)


def _account(answer: tuple[Account | None, tuple[str, str] | None]) -> Account:
    account, error = answer
    if error is not None:
        raise DataError(*error)
    assert account is not None
    return account


def _task(
    folder: str, task: Task, function: Callable[..., Account]
) -> tuple[Account | None, tuple[str, str] | None]:
    """In a worker: an account, or what and hint of a user's error."""
    before, begin = time.process_time(), time.monotonic()
    try:
        account = dict(function(folder, *task.arguments))
    except PipelineError as error:
        return None, (error.what, error.hint or "")
    account["_name"], account["_key"] = task.name, task.key
    account["_seconds"] = round(time.monotonic() - begin, 3)
    account["_cpu_s"] = round(time.process_time() - before, 3)
    account["_peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _write(str(join(folder, "_tasks")), f"{task.name}.json", account)
    return account, None
