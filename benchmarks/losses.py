"""Targets, losses and their gradient at the logits on a CPU, one thread: CPU milliseconds.

    python benchmarks/losses.py [--rounds 6]

To compare two versions of the code, run it in both trees in turn: PYTHONPATH=TREE. A tree from
before the kernels has other names, which this form does not know.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from pipeline.model.pair import Encoded
from pipeline.train.objective import Answer, Objective, ObjectiveSpec
from pipeline.views.batch import Views

GLOBAL, LOCAL, PATCHES, MASKED = 2, 8, 16, 0.15
CASES = (  # prototypes, images, type of logits, centring
    (1024, 64, torch.bfloat16, "softmax"),
    (8192, 32, torch.bfloat16, "softmax"),
    (8192, 32, torch.float32, "sinkhorn"),
    (65536, 8, torch.bfloat16, "softmax"),
    (65536, 8, torch.bfloat16, "sinkhorn"),
)


def milliseconds(
    prototypes: int, images: int, dtype: torch.dtype, centring: Any, rounds: int
) -> list[float]:
    """Of each round, without making the logits."""
    g = torch.Generator().manual_seed(0)
    views = Views(
        torch.zeros(GLOBAL * images, 3, 4, 4),
        torch.zeros(LOCAL * images, 3, 2, 2),
        torch.rand(GLOBAL * images, PATCHES, generator=g) < MASKED,
        images,
    )
    objective = Objective(ObjectiveSpec(centring=centring), prototypes, prototypes)
    patches = objective.masked(views)
    scored = len(patches.places)

    def logits(rows: int) -> torch.Tensor:
        return (0.3 * torch.randn(rows + scored, prototypes, generator=g)).to(dtype)

    teacher, noise = logits(GLOBAL * images), logits((GLOBAL + LOCAL) * images)
    cls = torch.randn(GLOBAL * images, 64, generator=g)
    times = []
    for _ in range(rounds):
        leaf = noise.clone().requires_grad_()
        student = Encoded(cls.clone().requires_grad_(), leaf.view_as(leaf), None)
        start = time.process_time()
        answers = iter([Answer(Encoded(cls, teacher, None), patches.rows)])
        target = next(objective.targets(answers, 0.05))
        objective.losses(student, target, views, patches, overwrite=True).total.backward()
        objective.commit()
        times.append(1e3 * (time.process_time() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for prototypes, images, dtype, centring in CASES:
        times = sorted(milliseconds(prototypes, images, dtype, centring, options.rounds))
        print(
            f"{prototypes} prototypes, {images} images, {str(dtype).removeprefix('torch.')}, "
            f"{centring}: {times[len(times) // 2]:.1f} ms ({times[0]:.1f} to {times[-1]:.1f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
