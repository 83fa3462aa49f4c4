"""The transcribed reference takes the steps that ours takes, so their times can be compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference_step import Block, Collated, Reference

from pipeline.train.step import ObjectiveSpec
from tests.train.small_run import HEAD, OTHER_HEAD, SPEC, VALUES, Run, views


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("ibot", [None, OTHER_HEAD], ids=["shared", "separate"])
def test_its_losses_and_weights_are_those_of_our_step(centring, ibot):
    ours = Run(ObjectiveSpec(centring=centring), ibot=ibot)
    reference = Reference(SPEC, (HEAD, ibot), sinkhorn=centring == "sinkhorn")
    reference.load(ours.pair.student.state_dict())
    for step in range(4):  # the centre of a step is used by the next one
        batch = views(6, seed=step)
        terms = reference.step(Collated.of(batch), VALUES)
        scalars = ours.step(batch).scalars
        for name, term in terms.items():
            torch.testing.assert_close(scalars[f"loss/{name}"], term, rtol=1e-5, atol=1e-6)
    theirs = dict(reference.teacher.named_parameters())
    for name, x in ours.weights().items():
        role, _, parameter = name.partition(".")
        if role == "teacher":
            torch.testing.assert_close(x, theirs[parameter], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_stochastic_depth_keeps_the_mean_of_a_branch(rate):
    """By a factor up to 0.1, by a subset of the views above: both are right on average."""
    torch.manual_seed(0)
    block = Block(replace(SPEC, drop_path=rate)).train()
    x = torch.randn(400, 5, SPEC.width)
    one = x[:1].expand(400, -1, -1)
    branch = block.ls1(block.attn(block.norm1(one)))[0]
    mean = (block._branch(one, block.norm1, block.attn, block.ls1) - one).mean(0)
    torch.testing.assert_close(mean, branch, rtol=0.15, atol=1e-3)
