"""`cluster/onprem.yaml` as a user launches it: `ray up`, submit, stop, resubmit, `ray down`.

Three hosts in network namespaces, reached by ssh. Only what the file says REPLACE to is filled in.
Other than in life, the hosts have no network beyond each other: the environment with the packages
of this project is already there, and the project is installed from a wheel of this checkout.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.check import problems
from cluster.checks.text import unfilled
from pipeline.track.journal import read_steps
from tests.cluster.hosts import Host, hosts, lacking
from tests.cluster.nodes import ROOT, clean_environment, free_port, wait_for
from tests.tiny import write_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]
STEPS = 2000  # so many that a stop comes before the last one
SHARED = "/mnt/shared"  # on the hosts
RAY = str(Path(sys.executable).with_name("ray"))
OURS = re.compile(r"raylet|gcs_server|ray::|/ray/|mlflow|ray start")


class Launch:
    """A checkout, three hosts, and the machine that a user sits at.

    Attributes:
        clone: the checkout, with `cluster/onprem.yaml` filled in.
        shared: the folder that the hosts see as /mnt/shared.
        dashboard: this end of the tunnel, once there is one.
    """

    def __init__(self, folder: Path, machines: list[Host]) -> None:
        self.clone, self.shared = folder / "raydino", folder / "shared"
        self.home, self.machines = folder / "home", machines
        self.file = self.clone / "cluster" / "onprem.yaml"
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        (self.home / ".ray").mkdir(parents=True)
        (self.home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        # `ray up` keeps its state below RAY_TMPDIR; the token is below HOME
        self.env = clean_environment() | {
            "HOME": str(self.home),
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
        }

    def ray(self, *argv: str, env: dict[str, str] | None = None) -> tuple[int, str]:
        """Runs `ray …` in the checkout to its end; (exit code, all that it printed)."""
        done = subprocess.run(
            [RAY, *argv],
            cwd=self.clone,
            env=self.env if env is None else env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        return done.returncode, done.stdout

    def job(self, verb: str, *argv: str, **more: dict[str, str]) -> tuple[int, str]:
        return self.ray("job", verb, "--address", self.dashboard, *argv, **more)

    def submit(self, name: str) -> None:
        """The same run each time, under a name of the job's own."""
        code, shown = self.job(
            "submit",
            *("--submission-id", name, "--working-dir", ".", "--no-wait", "--"),
            *("python", "jobs/run.py", "tiny.yaml", f"run.folder={SHARED}/runs"),
            *(f"data.source={SHARED}/photos", f"optim.steps={STEPS}", "train.eval_every=500"),
            "track.enabled=true",
        )
        assert code == 0, shown

    def status(self, name: str) -> str:
        """Of a job: STOPPED, SUCCEEDED, …"""
        token = (self.home / ".ray" / "auth_token").read_text()
        url = f"{self.dashboard}/api/jobs/{name}"
        code, shown = fetch(url, Authorization=f"Bearer {token}")
        assert code == 200, shown
        return str(json.loads(shown)["status"])

    @contextmanager
    def following(self, name: str) -> Iterator[subprocess.Popen[str]]:
        """`ray job logs --follow`, a line at a time."""
        process = subprocess.Popen(
            [RAY, "job", "logs", "--address", self.dashboard, "--follow", name],
            cwd=self.clone,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    @contextmanager
    def tunnel(self) -> Iterator[None]:
        """`ray dashboard`: the head's port 8265, at a port of this machine."""
        port = self.dashboard.rpartition(":")[2]
        process = subprocess.Popen(
            [RAY, "dashboard", str(self.file), "--port", port],
            cwd=self.clone,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_for(lambda: fetch(f"{self.dashboard}/api/version")[0], "the tunnel")
            yield
        finally:
            os.killpg(process.pid, 15)
            process.wait()


def fetch(url: str, data: object = None, **headers: str) -> tuple[int, str]:
    """(status, body) of a request; status 0 where nothing answers."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, headers | {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def checkout(into: Path) -> None:
    """What git tracks, as a clone would have it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, into / name)


def wheel(clone: Path, into: Path) -> Path:
    """The project as a wheel, for hosts that reach no registry."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(into)]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = into.glob("raydino-*.whl")
    return made


def fill_in(launch: Launch, source: Path) -> None:
    """What the comments of the file ask for, and no more."""
    head, *workers = launch.machines
    text = launch.file.read_text()
    for old, new in {
        "cluster_name: raydino-onprem": f"cluster_name: {head.net.name}",
        "head_ip: REPLACE": f"head_ip: {head.address}",
        "worker_ips: [REPLACE]": f"worker_ips: [{', '.join(host.address for host in workers)}]",
        "min_workers: 1": f"min_workers: {len(workers)}",
        "max_workers: 1": f"max_workers: {len(workers)}",
        "ssh_user: REPLACE": "ssh_user: root",
        "ssh_private_key: REPLACE": f"ssh_private_key: {head.key}",
        "git+https://git.REPLACE.example/raydino@v0.2.0": f"file://{source}",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    launch.file.write_text(text)
    assert unfilled(text) == 0
    assert problems(launch.file) == []


def furnish(host: Host, shared: Path) -> None:
    """What an administrator does: mounts the shared folder, and leaves packages in ~/raydino."""
    mounts = f"mount -t tmpfs none /mnt && mkdir {SHARED} && mount --bind {shared} {SHARED}"
    done = host.run("bash", "-ec", mounts)
    assert done.returncode == 0, done.stderr
    python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    done = host.run(str(python), "-m", "venv", "/root/raydino")
    assert done.returncode == 0, done.stdout + done.stderr
    own = host.folder / "home" / "raydino"
    if not own.is_dir():  # where the home is put together of several folders
        own = host.folder / "root" / "root" / "raydino"
    (site,) = own.glob("lib/python3*/site-packages")
    for old in site.glob("setuptools*"):  # of Python 3.11, too old for torch; there is another one
        shutil.rmtree(old)
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = own / "bin" / "ray"
    script.write_text(
        "#!/root/raydino/bin/python\nimport sys\nfrom ray.scripts.scripts import main\n"
        "sys.exit(main())\n"
    )
    script.chmod(0o755)


def photos(folder: Path) -> None:
    """64 images of noise."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for number in range(64):
        pixels = draw.integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")


def lacking_here() -> str:
    """Why this cannot run here; empty where it can."""
    if reason := lacking(ssh=True):
        return reason
    if missing := [tool for tool in ("rsync", "git") if not shutil.which(tool)]:
        return f"`ray up` needs {', '.join(missing)}, not found here"
    if not (ROOT / ".git").exists():
        return "needs a git checkout, to launch from what git tracks"
    return ""


@pytest.fixture
def launch() -> Iterator[Launch]:
    if reason := lacking_here():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    with hosts(3, ssh=True) as machines:
        made = Launch(folder, machines)
        checkout(made.clone)
        write_tiny(
            made.clone / "tiny.yaml",
            data={"max_bad_fraction": 0.05},
            resources={"cpus": 2, "object_store_gb": 0.2},
        )
        made.shared.mkdir()
        photos(made.shared / "photos")
        for host in machines:
            furnish(host, made.shared)
        fill_in(made, wheel(made.clone, folder))
        yield made
    shutil.rmtree(folder, ignore_errors=True)


def left(machines: list[Host]) -> list[str]:
    """Command lines of Ray and MLflow that run on the hosts."""
    found = []
    for host in machines:
        shown = host.run("ps", "-eo", "stat,args").stdout.splitlines()[1:]
        found += [f"{host.name}: {s}" for s in shown if OURS.search(s) and not s.startswith("Z")]
    return found


def test_up_submit_stop_resubmit_down(launch: Launch) -> None:
    clock = time.monotonic()

    def took(what: str) -> None:
        nonlocal clock
        print(f"{what}: {time.monotonic() - clock:.0f} s")
        clock = time.monotonic()

    head = launch.machines[0]
    code, shown = launch.ray("up", "-y", str(launch.file))
    assert code == 0, shown
    took("ray up")
    with launch.tunnel():
        # nothing but the tunnel leads to the dashboard, and nothing without the token
        assert fetch(f"http://{head.address}:8265/api/version")[0] == 0
        assert fetch(f"{launch.dashboard}/api/jobs/")[0] == 401
        stranger = launch.env | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        code, shown = launch.job("list", env=stranger)
        assert code != 0 and "token" in shown.lower(), shown
        code, shown = launch.job(
            "submit", "--no-wait", "--", "touch", f"{SHARED}/intruder", env=stranger
        )
        assert code != 0 and "token" in shown.lower(), shown
        wait_for(lambda: joined(launch) == 2, "both workers", 600, lambda: monitor(head))
        took("both workers")

        launch.submit("first")
        with launch.following("first") as process:
            assert process.stdout
            seen = []
            for line in process.stdout:
                seen.append(line)
                if re.match(r"step 0*[2-9]\d/", line):
                    break
            else:
                raise AssertionError("ended before step 20:\n" + "".join(seen))
        took("20 steps")
        code, shown = launch.job("stop", "first")
        assert code == 0, shown
        assert launch.status("first") == "STOPPED"
        took("ray job stop")
        rows = steps(launch)
        assert 20 <= len(rows) < STEPS

        launch.submit("second")
        with launch.following("second") as process:
            assert process.stdout
            console = process.stdout.read()
        assert launch.status("second") == "SUCCEEDED", console
        took("the rest")
        resumed = re.search(r"resumed     from the checkpoint at step (\d+)", console)
        assert resumed, console
        assert int(resumed[1]) >= 15
        assert "pack        up to date" in console
        assert list(steps(launch)) == list(range(STEPS))
        assert not (launch.shared / "intruder").exists()

        # MLflow on the head has the run, and answers to its own name only
        server = f"http://{head.address}:5000"
        search = f"{server}/api/2.0/mlflow/experiments/search"
        code, shown = fetch(search, {"max_results": 10, "filter": "name = 'tiny'"})
        assert code == 200 and len(json.loads(shown).get("experiments", [])) == 1, shown
        assert fetch(search, {"max_results": 10}, Host="evil.example")[0] == 403
        assert (launch.shared / "mlflow" / "mlflow.db").stat().st_size > 0

    done = subprocess.run(
        ["bash", "cluster/down.sh", str(launch.file)],
        cwd=launch.clone,
        env=launch.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "may still run" not in done.stderr
    took("ray down")
    ended = "Ray and MLflow to end"
    wait_for(lambda: not left(launch.machines), ended, 600, lambda: str(left(launch.machines)))
    took("no process left")


def joined(launch: Launch) -> int:
    """Nodes other than the head that Ray has, by a job's eyes."""
    code = (
        "import ray; ray.init(logging_level='error'); "
        "print('nodes', sum(n['Alive'] and n['Resources'].get('CPU', 0) > 0 for n in ray.nodes()))"
    )
    done = launch.machines[0].run(
        "bash", "-c", f'. /root/raydino/bin/activate; RAY_AUTH_MODE=token python -c "{code}"',
        env=os.environ | {"HOME": "/root", "RAY_ADDRESS": "auto"},
    )  # fmt: skip
    found = re.search(r"nodes (\d+)", done.stdout)
    return int(found[1]) if found else -1


def monitor(head: Host) -> str:
    """What the autoscaler on the head says."""
    found = sorted((head.folder / "ray").glob("session_2*/logs/monitor*"))
    return "\n".join(path.read_text(errors="replace")[-3000:] for path in found)


def steps(launch: Launch) -> dict[int, dict[str, float]]:
    """Training steps of the journal."""
    rows = read_steps(launch.shared / "runs" / "tiny" / "metrics.jsonl", "pretrain")
    return {step: row for step, row in rows.items() if "loss/total" in row}
