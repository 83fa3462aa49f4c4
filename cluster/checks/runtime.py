"""Rules for the runtime environments of submitted jobs: Ray's own check, then ours."""

from __future__ import annotations

from typing import Any

FIELDS = {"env_vars", "pip", "uv", "conda", "image_uri", "working_dir", "py_modules", "config"}
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
LEAST_S = 60.0  # a step, a checkpoint and the last messages


def is_runtime_env(document: dict[str, Any]) -> bool:
    """Whether it is one rather than a cluster file, by its fields."""
    return "provider" not in document and bool(FIELDS & document.keys())


def runtime_problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with a runtime environment, one sentence each."""
    if unknown := sorted(document.keys() - FIELDS):
        return [f"{unknown[0]} is no field of a runtime environment"]
    from ray.runtime_env import RuntimeEnv

    try:
        RuntimeEnv(**document)
    except (TypeError, ValueError) as error:
        return [f"Ray refuses the file: {str(error).splitlines()[0]}"]
    given = document.get("env_vars", {}).get(STOP_WAIT)
    if given is None:
        return [f"env_vars: no {STOP_WAIT}; Ray kills a stopped job after 3 s, without checkpoint"]
    try:
        seconds = float(given)
    except ValueError:
        return [f"env_vars: {STOP_WAIT}={given} is no number of seconds"]
    if seconds < LEAST_S:
        return [f"env_vars: {STOP_WAIT}={given} is too short for a step and a checkpoint; give 600"]
    return []
