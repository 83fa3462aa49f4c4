"""Joins the Ray cluster there is, or starts a small one in this process."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.arrangement import Machine
    from pipeline.config import Resources

QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",  # extra actors cost seconds at start
    # For so long a data set whose workers were killed keeps its share of the CPUs.
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "180",  # a loaded machine needs more than the default 30
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
ROOT = Path(__file__).resolve().parents[1]


def quiet_environment() -> None:
    """Sets Ray's switches for a readable console, unless the user set them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    for name in ("ray.data", "ray.train", "ray.tune", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def joined(resources: Resources) -> Iterator[None]:
    """Inside, this process is a Ray driver; a Ray that was started here ends with it.

    The cluster is the one of `RAY_ADDRESS` (set by `ray job submit`), else one on this machine.

    Raises:
        PipelineError: where the address answers nothing.
    """
    quiet_environment()
    import ray

    address = os.environ.get("RAY_ADDRESS")
    variables = {name: os.environ[name] for name in QUIET}
    folder = None
    options: dict[str, object]
    if address:
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # in a job, Ray sends the code itself
            variables["PYTHONPATH"] = _python_path()
        options = {"address": address, "runtime_env": {"env_vars": variables}}
    else:
        variables["PYTHONPATH"] = _python_path()
        # Unix socket paths are limited to 107 bytes, so the folder must be short.
        folder = tempfile.mkdtemp(prefix="rd", dir="/tmp" if Path("/tmp").is_dir() else None)
        options = {
            "address": "local",
            "num_cpus": resources.cpus,
            "object_store_memory": int(resources.object_store_gb * 2**30),
            "_temp_dir": folder,
            "include_dashboard": False,
            "runtime_env": {"env_vars": variables},
        }
    try:
        debug = bool(os.environ.get("PIPELINE_DEBUG"))
        ray.init(logging_level="error", log_to_driver=debug, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if not address:
            raise
        reason = str(error).strip().splitlines()[0]
        raise PipelineError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {reason}",
            "start it, give host:6379 or auto (http://host:8265 is for `ray job submit`), "
            "or unset RAY_ADDRESS to run on this machine",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def machine() -> Machine:
    """CPUs and GPUs of the whole cluster, and whether this CPU is fast in bfloat16."""
    import ray

    from pipeline.arrangement import Machine

    total = ray.cluster_resources()
    return Machine(
        cpus=max(1, int(total.get("CPU", 1))),
        gpus=int(total.get("GPU", 0)),
        bfloat16=cpu_has_bfloat16(),
    )


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX or AVX-512 BF16)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def nodes() -> int:
    """Nodes alive in the cluster."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT)
