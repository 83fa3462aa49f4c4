"""How many images at once fit on a GPU: the plan's own arithmetic, which no GPU has measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config.config import Config
from pipeline.errors import ConfigError
from pipeline.model.pair import Pair
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.stages.checks.micro_batches import GPU_ROOM
from pipeline.train import build, estimate

ENOUGH = 32  # images at once, above which it does not pay to compute activations again


@dataclass(frozen=True)
class Fit:
    """A way to compute a step on a GPU.

    Attributes:
        accumulation: micro batches of a worker in a step.
        micro_batch: images of one of them.
        checkpointing: activations are computed again in the backward pass.
        total: bytes that it takes by the plan's estimate.
    """

    accumulation: int
    micro_batch: int
    checkpointing: bool
    total: float


def fit(config: Config, machine: Machine, images: int, gpu_bytes: float) -> Fit:
    """The largest micro batch that fits; activations are computed again only where few fit.

    Raises:
        ConfigError: not even two images fit.
    """
    ways = [_largest(config, machine, images, gpu_bytes, again) for again in (False, True)]
    plain, lean = ways
    if plain and (plain.micro_batch >= ENOUGH or not lean):
        return plain
    if best := lean or plain:
        return best
    raise ConfigError(
        f"a step of model.size={config.model.size} does not fit into {gpu_bytes / 2**30:.0f} GiB, "
        "however few images are computed at once",
        "take a smaller network or fewer prototypes: model.size=vits head.prototypes=16384",
    )


def _largest(
    config: Config, machine: Machine, images: int, gpu_bytes: float, checkpointing: bool
) -> Fit | None:
    update = {"activation_checkpointing": checkpointing}
    train = config.train.model_copy(update=update)
    plan, built = planned(config.model_copy(update={"train": train}), machine, images)
    memory = estimate.estimated_cost(plan, built).memory
    for micro, accumulation in _pieces(plan):
        total = memory.of(micro, accumulation).total
        if total <= GPU_ROOM * gpu_bytes:
            return Fit(accumulation, micro, checkpointing, total)
    return None


def _pieces(plan: Plan) -> Iterator[tuple[int, int]]:
    """(images at once, micro batches of a worker), the largest first; two images at least."""
    share = plan.config.optim.global_batch_size // plan.workers
    for accumulation in range(1, share // 2 + 1):
        if share % accumulation == 0:
            yield share // accumulation, accumulation


def planned(config: Config, machine: Machine, images: int) -> tuple[Plan, Pair]:
    """The plan on a machine, and its networks, on GPUs without weights.

    Raises:
        PipelineError: the recipe does not fit the images or the machine.
    """
    plan = resolve(config, SetFacts(images, "not packed yet"), machine=machine)
    return plan, build.for_estimate(plan)
