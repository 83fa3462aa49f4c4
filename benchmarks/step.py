"""What a training step of the product costs on a CPU, against a plain loop of the same network.

    python benchmarks/step.py SHARDS [--network vit residual] [--rounds N] [--steps N]

SHARDS is a folder that `jobs/pack.py configs/cifar10.yaml` has filled. `ours` is `jobs/pretrain.py`
through Ray Train and Ray Data: the CPU seconds of ALL processes of the run in a window of steps,
divided by the steps; with one worker of one thread, as the plain loop has, and with two that halve
the batch, as the recipe has. The plain loop (`plain_step.py`) is one process of one thread with the
same network, batch, crops and colours, whose losses and update are written in plain torch. Two of
its steps of half the batch say what halving costs by itself, and two loops at once what busy cores
cost each other. All begin with encoded images in parquet files. They run in turn, so that a slow
moment of a shared machine meets all. Evaluation and checkpoints lie outside the window.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
SETTLED, TRACED = 60, 10  # steps before the window; steps of the trace after it
# The recipe of each network, beside that of configs/cifar10.yaml.
NETWORKS: dict[str, list[str]] = {
    "residual": [],
    "vit": [
        "evaluate.image_size=32",
        "model.encoder=dinov2",
        "model.width=192",
        "model.depth=6",
        "model.heads=3",
        "model.patch_size=8",
        "model.registers=1",
        "head.norm=none",
        "loss.ibot_weight=1",
        "loss.mask_probability=0.5",
        "augment.local_crops=4",
        "augment.local_size=16",
        "optim.global_batch_size=64",
        "optim.lr=1e-3",
    ],
}


WORKERS: dict[str, list[str]] = {
    "ours, one worker": ["train.workers=1", "resources.threads=1"],
    "ours, two workers": ["train.workers=2"],
}


def recipe(network: str, *more: str) -> list[str]:
    """The recipe file and the fields of a network."""
    return [str(ROOT / "configs" / "cifar10.yaml"), *NETWORKS[network], *more]


def kind_of(process: psutil.Process) -> str:
    """What a process of a run is, from its command line."""
    line = " ".join(process.cmdline())
    names = {
        "TrainWorker": "training workers",
        "_Decode": "decoders",
        "_MapWorker": "decoders",
        "MapWorker": "decoders",
        "_Read": "reading",
        "SplitCoordinator": "split coordinator",
        "Dealer": "dealer",
        "Feeder": "feeder",
        "Evaluator": "evaluator",
        "TrainController": "train controller",
        "raylet/raylet": "raylet",
        "gcs_server": "gcs",
        "jobs/pretrain.py": "driver",
        "dashboard": "dashboard agents",
        "agent": "dashboard agents",
        "log_monitor": "log monitor",
    }
    other = f"other: {Path(line.split()[-1]).name if '.py' in line else line[:40]}"
    return next((kind for part, kind in names.items() if part in line), other)


class Meter:
    """CPU seconds of a process and all its descendants, by kind of process."""

    def __init__(self, root: int) -> None:
        self.root = psutil.Process(root)
        self.seconds: dict[tuple[int, float], float] = {}
        self.kinds: dict[tuple[int, float], str] = {}

    def read(self) -> None:
        """Looks at all processes; what a process that ended since used until then stays."""
        for process in [self.root, *self.root.children(recursive=True)]:
            try:
                times, key = process.cpu_times(), (process.pid, process.create_time())
                self.kinds[key] = kind_of(process)
                self.seconds[key] = times.user + times.system
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue

    def now(self) -> dict[tuple[int, float], float]:
        """The seconds of each process so far."""
        self.read()
        return dict(self.seconds)

    def between(
        self, before: dict[tuple[int, float], float], after: dict[tuple[int, float], float]
    ) -> dict[str, float]:
        """CPU seconds by kind."""
        kinds: dict[str, float] = defaultdict(float)
        for key, seconds in after.items():
            kinds[self.kinds[key]] += seconds - before.get(key, 0.0)
        return dict(kinds)


def last_step(metrics: Path) -> int:
    """Steps that a run has logged."""
    if not metrics.exists():
        return 0
    steps = [0]
    for line in metrics.read_text().splitlines():
        if line.endswith("}") and '"loss/total"' in line:
            steps.append(json.loads(line)["step"] + 1)
    return max(steps)


@dataclass(frozen=True)
class Taken:
    """What a run of ours took: milliseconds a step, and the parts of a step of rank 0's trace."""

    cpu: dict[str, float]  # by kind of process
    wall: float
    trace: str


def ours(shards: str, network: str, steps: int, fields: list[str]) -> Taken:
    """One run through `jobs/pretrain.py`."""
    first, last = SETTLED, SETTLED + steps
    with tempfile.TemporaryDirectory() as folder:
        end = last + 5 + TRACED
        settings = [
            f"data.shards={shards}",
            "data.source=",
            "evaluate.queries=",
            "evaluate.during_training=64",
            f"run.folder={folder}",
            "run.name=step",
            "track.enabled=false",
            f"optim.steps={end}",
            f"train.eval_every={end}",
            f"train.save_every={end}",
            "train.log_every=10",
            f"train.profile_steps=[{end - TRACED + 1},{end}]",
        ]
        command = [sys.executable, "jobs/pretrain.py", *recipe(network, *settings, *fields)]
        output = Path(folder) / "output"
        with output.open("w") as out:
            run = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
            meter = Meter(run.pid)
            metrics = Path(folder) / "step" / "metrics.jsonl"

            def at(step: int) -> tuple[dict[tuple[int, float], float], int]:
                while (done := last_step(metrics)) < step:
                    if run.poll() is not None:
                        raise SystemExit(output.read_text())
                    meter.read()
                    time.sleep(0.2)
                return meter.now(), done

            before, start = at(first)
            begin = time.monotonic()
            after, stop = at(last)
            seconds = time.monotonic() - begin
            if run.wait():
                raise SystemExit(output.read_text())
        kinds = meter.between(before, after)
        per_step = {kind: 1000 * s / (stop - start) for kind, s in kinds.items()}
        (table,) = (Path(folder) / "step" / "pretrain" / "profile").glob("*.md")
        return Taken(per_step, 1000 * seconds / (stop - start), table.read_text())


def plain(shards: str, network: str, steps: int, *how: str, loops: int = 1) -> float:
    """CPU milliseconds a step of the plain loop.

    Args:
        shards: the folder.
        network: of `NETWORKS`.
        steps: that count.
        how: "decoded", images are decoded before the clock starts; "half", of half the batch.
        loops: that run at once, each for itself; the mean of them.
    """
    command = [sys.executable, "benchmarks/plain_step.py", shards, network, str(steps), *how]
    runs = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(loops)
    ]
    said = [run.communicate()[0] for run in runs]
    if any(run.returncode for run in runs):
        raise SystemExit("the plain loop failed; what it said stands above")
    return statistics.mean(float(text.split()[-1]) for text in said)


def spread(values: list[float], form: Callable[[float], str]) -> str:
    """Median (smallest to largest)."""
    return f"{form(statistics.median(values))} ({form(min(values))} to {form(max(values))})"


def compare(shards: str, network: str, rounds: int, steps: int, fields: list[str]) -> None:
    """Prints all in turn, their ratio, and where the CPU time of ours goes."""
    loops: dict[str, Callable[[], float]] = {
        "plain loop": lambda: plain(shards, network, steps),
        "plain loop, decoded before": lambda: plain(shards, network, steps, "decoded"),
        "plain loop, two halves": lambda: 2 * plain(shards, network, steps, "half"),
        "plain loops, two at once": lambda: plain(shards, network, steps, loops=2),
    }
    cpu: dict[str, list[float]] = defaultdict(list)
    runs: dict[str, list[Taken]] = defaultdict(list)
    for number in range(rounds):
        for name, loop in loops.items():
            cpu[name].append(loop())
        for name, workers in WORKERS.items():
            runs[name].append(ours(shards, network, steps, [*workers, *fields]))
            cpu[name].append(sum(runs[name][-1].cpu.values()))
        row = ", ".join(f"{name} {values[-1]:.0f}" for name, values in cpu.items())
        print(f"{network} round {number + 1}: CPU ms a step: {row}", flush=True)
    print(f"\n{network}, {rounds} rounds of {steps} steps, CPU ms a step, median (min to max):")
    for name, values in cpu.items():
        ratio = [a / b for a, b in zip(values, cpu["plain loop"], strict=True)]
        line = f"{name:36} {spread(values, lambda x: f'{x:.0f}')}"
        print(f"{line}; of the plain loop {spread(ratio, lambda x: f'{x:.2f}')}")
    for name, taken in runs.items():
        wall = spread([run.wall for run in taken], lambda x: f"{x:.0f}")
        print(f"\n{name}: {wall} ms of wall time a step; CPU ms by process:")
        for kind in sorted(taken[-1].cpu, key=lambda kind: -taken[-1].cpu[kind]):
            values = [run.cpu.get(kind, 0.0) for run in taken]
            print(f"{kind:36} {spread(values, lambda x: f'{x:.1f}')}")
        print(f"\ninside worker 0, traced:\n{taken[-1].trace}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--fields", nargs="*", default=[], help="others of ours, a.b=value")
    arguments = parser.parse_args()
    for network in arguments.network:
        compare(
            str(Path(arguments.shards).resolve()),
            network,
            arguments.rounds,
            arguments.steps,
            arguments.fields,
        )


if __name__ == "__main__":
    main()
