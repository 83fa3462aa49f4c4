"""What a plan says of a part of the weights, against what is there and what is counted."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.model.pair import HeadSpec, build_pair
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve
from pipeline.stages.pretrain import describe
from pipeline.train import build, estimate
from pipeline.train.checkpoint.names import divided
from pipeline.train.parallel.memory import state_bytes
from pipeline.train.parallel.strategy import Layout
from pipeline.train.speed.flops import Group, vit_flops
from pipeline.train.tune.choose import tuned
from pipeline.train.tune.share import share
from tests.train.small_run import SPEC
from tests.train.tune.test_choose import TUNES, config, held, step

CPU = torch.device("cpu")


@pytest.mark.parametrize("tune", ["all", *TUNES])
def test_states_and_checkpoint_are_as_large_as_planned(tune: str) -> None:
    state = held(tune)
    step(state, 0)
    planned = state_bytes(state.pair, Layout(1, CPU), accumulation=1)
    tensors = divided(state.state())[0]
    moments = sum(x.nbytes for name, x in tensors.items() if name.endswith(("exp_avg", "avg_sq")))
    assert planned.moments == moments == share(state.pair).optimizer
    gradients = [p.grad for p in state.pair.student.parameters() if p.grad is not None]
    assert planned.gradients == sum(x.nbytes for x in gradients)
    storages = {p.data_ptr(): p.nbytes for each in state.pair for p in each.parameters()}
    assert planned.student + planned.teacher == sum(storages.values())
    weights = sum(x.nbytes for n, x in tensors.items() if n.startswith(("student/", "teacher/")))
    assert share(state.pair).checkpoint == weights + moments


def test_the_share_is_that_of_plain_weights() -> None:
    plain, low = (share(held(tune).pair) for tune in ("all", "lora(rank=3)"))
    assert plain.backbone == plain.backbone_of_all == low.backbone_of_all
    assert plain.every_of_all == low.every_of_all
    assert low.optimizer_of_all == plain.optimizer
    assert low.checkpoint_of_all == plain.checkpoint
    # two factors of each of four matrices of two blocks, and the mask token
    width = SPEC.width
    sizes = (width + 3 * width, 2 * width, width + 4 * width, width + 4 * width)
    assert low.backbone == 2 * 3 * sum(sizes) + width


@pytest.mark.parametrize("tune", ["all", "last_blocks=2", "lora(rank=4)", "heads"])
def test_the_operations_of_a_step_are_those_that_torch_counts(tune: str) -> None:
    spec = replace(SPEC, width=48, depth=8, heads=3)
    recipe = config(tune, "model.width=48", "model.depth=8", "model.heads=3")
    backbone = tuned(build_pair(spec, HeadSpec(8, 4, 8), None, 0), recipe).student.backbone
    probe = copy.deepcopy(backbone)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        out = probe(torch.zeros(2, 3, 28, 28))
        if out.requires_grad:
            out.sum().backward()
    ours = vit_flops(backbone, [Group(2, 28)], training=True)
    # the lowest layer that learns gives no gradient to what is below it
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_the_plan_says_it() -> None:
    recipe = config("lora(rank=3)")
    plan = resolve(recipe, SetFacts(80, "d"), machine=Machine(cpus=2, gpus=0, bfloat16=False))
    pair = tuned(build.pair(recipe), recipe)
    lines = describe(plan, pair, estimate.estimated_cost(plan, pair))
    line = next(line for line in lines if line.startswith("tune "))
    of = share(pair)
    assert line.startswith("tune        lora(rank=3): ")
    assert f"({100 * of.backbone / of.backbone_of_all:.1f} %) weights of the backbone learn" in line
    assert f"({100 * of.optimizer / of.optimizer_of_all:.1f} %), a checkpoint" in line
    recipe = config("heads", "train.freeze_backbone_steps=3")
    plan = resolve(recipe, SetFacts(80, "d"), machine=Machine(cpus=2, gpus=0, bfloat16=False))
    pair = tuned(build.pair(recipe), recipe)
    said = "\n".join(describe(plan, pair, estimate.estimated_cost(plan, pair)))
    assert "train.freeze_backbone_steps is not used: no backbone learns" in said
    assert "0.00 of " in said
