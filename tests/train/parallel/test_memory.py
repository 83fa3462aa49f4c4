"""Bytes of the networks on a worker, against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.model.pair import HeadSpec, build_pair
from pipeline.model.vit import BackboneSpec
from pipeline.train.parallel.memory import activations, state_bytes
from pipeline.train.parallel.strategy import Layout

CPU = torch.device("cpu")
SPEC = BackboneSpec(image_size=28, width=24, depth=3, heads=2)
# by hand: a block of width 24 and MLP 96
PRODUCTS = (24 * 72 + 72) + (24 * 24 + 24) + (24 * 96 + 96) + (96 * 24 + 24)
BLOCK = PRODUCTS + 4 * 24 + 2 * 24  # two norms, two LayerScales
HEAD_PRODUCTS = (24 * 16 + 16) + (16 * 16 + 16) + (16 * 8 + 8)
HEAD = HEAD_PRODUCTS + 20 * 8 + 20
PATCH = 3 * 14 * 14 * 24 + 24
REST = 24 * (1 + 5 + 4 + 1) + PATCH + 2 * 24  # CLS, positions, registers, mask, and the last norm
ALL = 3 * BLOCK + HEAD + REST


def test_ddp_holds_all() -> None:
    pair = build_pair(SPEC, HeadSpec(20, 8, 16), None, seed=0)
    held = state_bytes(pair, Layout(8, CPU, precision=torch.bfloat16), accumulation=2)
    assert held.student == held.gradients == held.teacher == 4 * ALL
    assert held.moments == 8 * ALL and held.frozen == held.gathered == 0
    assert held.lower == 2 * (3 * PRODUCTS + HEAD_PRODUCTS + PATCH)
    assert held.total == 20 * ALL + held.lower


def test_fsdp_holds_a_share_and_what_is_at_work() -> None:
    pair = build_pair(SPEC, HeadSpec(20, 8, 16), None, seed=0)
    pair.frozen = build_pair(replace(SPEC, depth=4), HeadSpec(20, 8, 16), None, seed=1).teacher
    layout = Layout(8, CPU, "fsdp", torch.bfloat16)
    held = state_bytes(pair, layout, accumulation=1)
    assert held.student == held.gradients == held.teacher == 4 * ALL // 8
    assert held.moments == ALL and held.frozen == 4 * (ALL + BLOCK) // 8
    block = 2 * PRODUCTS + 4 * (BLOCK - PRODUCTS)
    rest = 2 * PATCH + 4 * (REST - PATCH)
    largest = max(block, rest) + 4 * max(BLOCK, REST)
    assert held.gathered == rest + 2 * block + largest and held.lower == 0
    twice = state_bytes(pair, layout, accumulation=2)
    assert twice.gradients == held.gradients + 4 * ALL
    one = state_bytes(pair, replace(layout, workers=1), accumulation=2)
    assert one.student == 4 * ALL and one.gathered == 0  # nobody to share with


def test_blocks_that_are_computed_again_keep_their_input() -> None:
    layout = Layout(1, CPU)
    assert activations(1700.0, 100.0, 12, layout) == 12 * 1700
    assert activations(1700.0, 100.0, 12, replace(layout, checkpointing=True)) == 12 * 100 + 1700
