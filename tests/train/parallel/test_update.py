"""Clipping and the update against torch's own function and formulas written out."""

from __future__ import annotations

import copy
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.loss.collectives import all_logsumexp
from pipeline.model.pair import build_pair, ema_update
from pipeline.train.parallel import strategy
from tests.train.small_run import HEAD, SPEC


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3, float("nan"), float("inf")])
def test_clipping_is_that_of_torch_to_the_bit(size: float) -> None:
    pair = build_pair(SPEC, HEAD, None, seed=0)
    student, other = pair.student, copy.deepcopy(pair.student)
    g = torch.Generator().manual_seed(1)
    for mine, theirs in zip(student.parameters(), other.parameters(), strict=True):
        mine.grad = size * torch.randn(mine.shape, generator=g)
        theirs.grad = mine.grad.clone()
    norms = strategy.clip(student, 3.0)
    for name, module in other.named_children():
        expected = nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        assert torch.equal(norms[name].nan_to_num(-1), expected.nan_to_num(-1))
    for mine, theirs in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad.nan_to_num(7), theirs.grad.nan_to_num(7))


def test_the_update_is_that_of_a_loop_written_out() -> None:
    """AdamW as a run has it, and the teacher, against their formulas."""
    pair = build_pair(SPEC, HEAD, None, seed=0)
    optimizer = torch.optim.AdamW(
        pair.student.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    weights = [p.detach().double().clone() for p in pair.student.parameters()]
    average = [p.double().clone() for p in pair.teacher.parameters()]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    g = torch.Generator().manual_seed(2)
    for step in range(1, 6):
        for n, parameter in enumerate(pair.student.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=g)
            grad = parameter.grad.double()
            first[n] = 0.9 * first[n] + 0.1 * grad
            second[n] = 0.99 * second[n] + 0.01 * grad**2
            weights[n] *= 1 - 1e-2 * 0.1
            scale = (second[n] / (1 - 0.99**step)).sqrt() + 1e-8
            weights[n] -= 1e-2 * first[n] / (1 - 0.9**step) / scale
            average[n] += 0.1 * (weights[n] - average[n])
        optimizer.step()
        ema_update(pair, 0.9)
    for mine, expected in zip(pair.student.parameters(), weights, strict=True):
        torch.testing.assert_close(mine.detach().double(), expected, rtol=0, atol=2e-6)
    for mine, expected in zip(pair.teacher.parameters(), average, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=2e-6)


def whole(rows: int) -> torch.Tensor:
    x = 100 * torch.randn(rows, 7, generator=torch.Generator().manual_seed(3))
    x[:, 2], x[0, 3] = -torch.inf, -torch.inf  # nobody has a row, and one worker has none
    return x


def member(rank: int, workers: int, folder: Path) -> None:
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=workers)
    expected = torch.logsumexp(whole(workers), dim=0)
    torch.testing.assert_close(all_logsumexp(whole(workers)[rank]), expected)
    dist.destroy_process_group()


def test_log_sums_over_workers_are_those_of_all_rows(tmp_path: Path) -> None:
    workers, members = 3, []
    for rank in range(workers):
        if not (pid := os.fork()):
            try:
                member(rank, workers, tmp_path)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        members.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in members] == [0] * workers
