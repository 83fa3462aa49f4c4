"""What a job opens on a machine of its own: loopback, and one socket of PyTorch's."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.jobs.conftest import ROOT, runner

pytestmark = pytest.mark.slow
LOOPBACK = ("127.", "::1", "::ffff:127.")


def listening(root: psutil.Process) -> set[tuple[str, str, int]]:
    """(process, address, port) of what a job and its processes listen on."""
    found = set()
    for process in [root, *root.children(recursive=True)]:
        try:
            for socket in process.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN:
                    found.add((process.name(), socket.laddr.ip, socket.laddr.port))
        except psutil.Error:
            continue
    return found


def test_a_job_listens_on_loopback(
    images: Path, recipe: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    place = [f"data.shards={tmp_path}/shards", f"run.folder={tmp_path}/runs"]
    packed = runner(environment)("pack", recipe, f"data.source={images}/train", *place)
    assert packed.returncode == 0, packed.stdout + packed.stderr
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    job = subprocess.Popen(
        [sys.executable, "-u", ROOT / "jobs" / "pretrain.py", recipe, *place]
        + ["track.enabled=true", "optim.steps=200"],
        env=environment | {"HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen: set[tuple[str, str, int]] = set()
    said = []
    try:
        assert job.stdout
        for line in job.stdout:
            said.append(line)
            if line.startswith("step "):
                seen |= listening(psutil.Process(job.pid))
            if line.startswith("step 020"):
                break
    finally:
        job.terminate()
        rest, _ = job.communicate(timeout=280)
        from pipeline.track import server

        mlflow = server.running(tmp_path / "runs" / "mlflow")
        deadline = time.monotonic() + 60
        if mlflow:  # it outlives the job, and is nobody's child
            found = listening(psutil.Process(mlflow.pid))
            while not found and time.monotonic() < deadline:
                time.sleep(0.2)
                found = listening(psutil.Process(mlflow.pid))
            seen |= found
            server.stop(tmp_path / "runs" / "mlflow")
    text = "".join(said) + rest
    assert any(name.startswith("gcs_server") for name, _, _ in seen), text
    assert any("RayTrainWorker" in name for name, _, _ in seen), text
    assert mlflow and any(port == mlflow.port for _, _, port in seen), text
    open_to_all = {(name, ip) for name, ip, _ in seen if not ip.startswith(LOOPBACK)}
    # The store by which training workers find each other: PyTorch has no address for it.
    assert all("RayTrainWorker" in name for name, _ in open_to_all), open_to_all
    stores = {port for _, ip, port in seen if not ip.startswith(LOOPBACK)}
    assert len(stores) <= 1, open_to_all
    token = tmp_path / "home" / ".ray" / "auth_token"
    assert oct(token.stat().st_mode & 0o777) == "0o600"  # Ray itself leaves it to everybody
