"""A step of ours against the reference's on this machine's CPU, measured in turn.

    python benchmarks/against_reference.py [--recipe demo] [--images 32] [--rounds 7]

Both take the same views, in float32, from the same weights; neither compiles. `gpu.py` has the same
for a GPU, in 16 bits. `reference_step.py` says what the reference is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from cases import VALUES, plan_of, spec_of, views_of
from reference_step import Collated, Reference

from pipeline.model.pair import HeadSpec
from pipeline.train import build, start
from pipeline.train.step import train_step

STEPS = 3  # of a round


def seconds(step: Callable[[], object]) -> float:
    """CPU seconds of one step: what else the machine does counts little."""
    begin = time.process_time()
    for _ in range(STEPS):
        step()
    return (time.process_time() - begin) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fields = ("train.precision=float32", "train.device=cpu", "model.init=")
    plan = plan_of(options.recipe, options.images, *fields, gpus=0)
    config, separate = plan.config, plan.config.ibot_head.separate
    pair = start.networks(plan, resumed=False)
    ibot = HeadSpec(**config.ibot_head.model_dump(exclude={"separate"}))
    reference = Reference(
        spec_of(plan), (HeadSpec(**config.head.model_dump()), ibot if separate else None),
        config.loss.centring == "sinkhorn", config.optim.layerwise_decay,
    )  # fmt: skip
    reference.load(pair.student.state_dict())
    state = start.train_state(plan, pair, build.layout(plan, torch.device("cpu")), resumed=False)
    views = views_of(plan, 0)
    collated, generator = Collated.of(views), torch.Generator().manual_seed(0)

    def ours() -> None:
        train_step(
            pair.student, pair, [views], state.optimizer, VALUES, state.objective,
            generator=generator,
        )  # fmt: skip

    def theirs() -> None:
        reference.step(collated, VALUES)

    ours(), theirs()
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(options.rounds)]
    ratios = sorted(other / own for other, own in pairs)
    both = [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
    print("| recipe | images | reference, CPU ms | ours, CPU ms | reference / ours |")
    print("|---" * 5 + "|")
    middle = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"| {options.recipe} | {options.images} | {both[0]:.0f} | {both[1]:.0f} | {middle} |")


if __name__ == "__main__":
    main()
