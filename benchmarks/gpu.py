"""What a GPU makes of it: one command, at most eight minutes, a table for RESULTS.md.

    python benchmarks/gpu.py [--budget 480] [--only PART ...] [--without PART ...] [--small]

Parts run in the order of what they tell for their time, each in a process of its own: one that
fails, or fills the memory, ends alone. Figures are printed as lines of JSON when they are there.
What the time does not allow is skipped, and said. `--small` runs every part tiny on a CPU, which
tells nothing but that it runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# As training workers have it; before torch is imported.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

import gpu_parts
from gpu_trainee import Size

BUDGET_S = 480.0
SLOW = 4  # times the seconds that a part should take: then it is ended
# A fork begins with all that is imported. Nothing here may touch a GPU: its children could not.
FORK = multiprocessing.get_context("fork")


class Part(NamedTuple):
    """One thing to measure."""

    name: str
    run: Callable[[Size], Iterator[dict[str, Any]]]
    seconds: float  # that it takes on a GPU, at least; it is not begun with less


PARTS = (
    Part("where", gpu_parts.where, 5),
    Part("ViT-L/16", gpu_parts.large, 40),
    Part("ViT-S/16", gpu_parts.small, 40),
    Part("losses", gpu_parts.losses, 10),
    Part("ViT-B/14", gpu_parts.base, 25),
    Part("job", gpu_parts.job, 70),
    Part("goldens", gpu_parts.goldens, 25),
    Part("parallel", gpu_parts.parallel, 30),
    Part("checkpoint", gpu_parts.checkpoint, 20),
    Part("neighbours", gpu_parts.neighbours, 10),
)


def measured(part: Part, size: Size, deadline: float) -> list[dict[str, Any]]:
    """The figures of a part, printed as they come."""
    lines: list[dict[str, Any]] = []

    def say(**figures: Any) -> None:
        lines.append({"part": part.name, **figures})
        print(json.dumps(lines[-1]), flush=True)

    left = deadline - time.monotonic()
    if left < (0 if size.small else part.seconds):
        say(skipped=f"{left:.0f} s are left, and it takes {part.seconds:.0f}")
        return lines
    if not size.small:
        left = min(left, SLOW * part.seconds)
    deadline = time.monotonic() + left
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_child, args=(part, Size(size.small, left), sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            say(**receiver.recv())
        say(failed="the time was over")
        process.kill()
    except EOFError:
        process.join()
        if process.exitcode and not (lines and "failed" in lines[-1]):
            say(failed=f"ended with code {process.exitcode}")
    process.join()
    return lines


def _child(part: Part, size: Size, sender: Connection) -> None:
    try:
        for figures in part.run(size):
            sender.send(figures)
    except Exception as error:
        traceback.print_exc()
        first = (str(error).strip() or "no reason given").splitlines()[0]
        sender.send({"failed": f"{type(error).__name__}: {first[:200]}"})
        sys.exit(1)


def table(lines: list[dict[str, Any]]) -> str:
    """All figures in Markdown: of steps in one table, the others below it."""
    steps = [x for x in lines if "step_ms" in x]
    ratios = {x["recipe"]: x for x in lines if "ratio" in x}
    head = (
        "| recipe | images | first step, s | ms (least to most) | images/s | MFU | peak, GiB "
        "| plan, GiB | reference, images/s | ratio |"
    )
    rows = [head, "|---" * 10 + "|"]
    for x in steps:
        name = f"{x['recipe']}, {x['strategy']}" if "strategy" in x else x["recipe"]
        low, high = x["spread_ms"]
        other = {} if "strategy" in x else ratios.get(x["recipe"], {})
        cells = (
            *(name, x["images"], x["first_step_s"], f"{x['step_ms']} ({low} to {high})"),
            *(x["images_s"], x["mfu"], x.get("peak_gib", ""), x["plan_gib"]),
            *(other.get("reference_images_s", ""), other.get("ratio", "")),
        )
        rows.append("| " + " | ".join(str(x) for x in cells) + " |")
    rows += ["", "| part | figures |", "|---|---|"]
    for x in lines:
        if "step_ms" not in x:
            said = ", ".join(f"{k} {_shown(v)}" for k, v in x.items() if k != "part")
            rows.append(f"| {x['part']} | {said} |")
    return "\n".join(rows)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"{k} x{v}" for k, v in value.items()) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def main(arguments: list[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--without", nargs="+", choices=names, default=[])
    parser.add_argument("--small", action="store_true", help="tiny, on a CPU")
    options = parser.parse_args(arguments)
    if options.small:
        os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("PYTHONPATH", str(gpu_parts.ROOT))
    deadline = time.monotonic() + options.budget
    lines: list[dict[str, Any]] = []
    for part in PARTS:
        if part.name in options.only and part.name not in options.without:
            lines += measured(part, Size(options.small), deadline)
    print(f"\n{table(lines)}")
    return any("failed" in line for line in lines)


if __name__ == "__main__":
    sys.exit(main())
