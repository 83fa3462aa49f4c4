"""What a run says before it starts of fields that do not do here what they ask for."""

from __future__ import annotations

from pipeline.config.config import Config
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve
from pipeline.stages.pretrain import describe
from pipeline.train import build, estimate
from tests.tiny import SECTIONS


def lines(cpus: int = 2, **train: str) -> str:
    """On CPUs, with `resources.streams=2`."""
    sections = SECTIONS | {
        "train": SECTIONS["train"] | train,
        "resources": SECTIONS["resources"] | {"streams": 2},
    }
    plan = resolve(
        Config.model_validate(sections),
        SetFacts(80, "d"),
        machine=Machine(cpus=cpus, gpus=0, bfloat16=False),
    )
    pair = build.pair(plan.config)
    return "\n".join(describe(plan, pair, estimate.estimated_cost(plan, pair)))


def test_streams_that_have_no_decoder_are_said() -> None:
    assert "streams     1 of resources.streams=2: each needs a worker and a decoder" in lines(2)
    assert "streams     2 (resources.streams), each with about" in lines(16)


def test_a_residual_type_that_is_not_used_is_said() -> None:
    said = "train.residual=bfloat16 is not used: precision is float32"
    assert said in lines(residual="bfloat16")
    assert said not in lines() + lines(residual="bfloat16", precision="bfloat16")
