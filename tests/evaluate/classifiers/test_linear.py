"""The linear grid against torch.optim, planted truth, and itself on two ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional

from pipeline.evaluate.classifiers.linear import (
    RATES,
    Choosing,
    Grid,
    Schedule,
    details_of,
    inputs_of,
    train,
)

DIM, BLOCKS, CLASSES = 5, 4, 3
WIDTH = (BLOCKS + 1) * DIM


def batches(size: int, count: int = 200, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of vectors whose classes a linear layer can tell, but for some noise."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, WIDTH, generator=generator)
    y = (x @ truth + torch.randn(count, CLASSES, generator=generator)).argmax(1)
    while True:
        rows = torch.randint(count, (size,), generator=generator)
        yield x[rows], y[rows]


def test_the_grid_is_that_of_dinov2() -> None:
    grid = Grid(inputs_of(DIM, BLOCKS, True), CLASSES, 1024)
    assert len(grid.heads) == 52 == len({head.name for head in grid.heads})
    taken = {group.name: set(range(group.start, group.stop)) for group in grid.inputs}
    last = set(range(3 * DIM, 4 * DIM))
    mean = set(range(4 * DIM, 5 * DIM))
    assert taken == {
        "last block": last,
        "last block + mean of patches": last | mean,
        "last 4 blocks": set(range(4 * DIM)),
        "last 4 blocks + mean of patches": set(range(5 * DIM)),
    }
    assert [head.rate for head in grid.heads[:13]] == list(RATES)


@pytest.mark.parametrize(
    ("blocks", "mean", "heads"), [(1, False, 13), (1, True, 26), (4, False, 26)]
)
def test_models_that_have_less_have_fewer_heads(blocks: int, mean: bool, heads: int) -> None:
    assert len(Grid(inputs_of(DIM, blocks, mean), CLASSES, 256).heads) == heads


def alone(grid: Grid, head: int, schedule: Schedule) -> nn.Linear:
    """One head by torch's own layer, loss, optimiser and schedule."""
    group, rate = divmod(head, len(RATES))
    inputs = grid.inputs[group]
    layer = nn.Linear(inputs.stop - inputs.start, CLASSES)
    columns = slice(rate * CLASSES, (rate + 1) * CLASSES)
    with torch.no_grad():
        layer.weight.copy_(grid.weights[group][:-1, columns].T)
        layer.bias.copy_(grid.weights[group][-1, columns])
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=RATES[rate] * schedule.batch / 256, momentum=0.9
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.steps)
    for x, y in islice(batches(schedule.batch), schedule.steps):
        loss = functional.cross_entropy(layer(x[:, inputs.start : inputs.stop]), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
    return layer


def test_each_head_is_what_torch_trains_alone() -> None:
    schedule = Schedule(batch=32, steps=50)
    grid = Grid(inputs_of(DIM, BLOCKS, True), CLASSES, schedule.batch, seed=3)
    heads = [0, 12, 20, 31, 45, 51]
    layers = [alone(grid, head, schedule) for head in heads]
    train(grid, batches(schedule.batch), schedule)
    x, y = next(batches(64, seed=5))
    hits, losses = grid.judge(x, y)
    for head, layer in zip(heads, layers, strict=True):
        group, rate = divmod(head, len(RATES))
        columns = slice(rate * CLASSES, (rate + 1) * CLASSES)
        weights = grid.weights[group][:, columns]
        torch.testing.assert_close(weights[:-1].T, layer.weight.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(weights[-1], layer.bias.detach(), atol=1e-5, rtol=0)
        inputs = grid.inputs[group]
        logits = layer(x[:, inputs.start : inputs.stop]).detach()
        expected = functional.cross_entropy(logits, y, reduction="none")
        torch.testing.assert_close(losses[:, head], expected, atol=1e-5, rtol=0)
        assert torch.equal(hits[:, head], logits.argmax(1) == y)


def test_first_weights_are_small_and_biases_zero() -> None:
    grid = Grid(inputs_of(400, 4, True), 10, 256)
    for weights in grid.weights:
        assert weights[:-1].std().item() == pytest.approx(0.01, rel=0.02)
        assert not weights[-1].any()
    other = Grid(inputs_of(400, 4, True), 10, 256, seed=1)
    assert not torch.equal(grid.weights[0], other.weights[0])


def choosing(grid: Grid, x: Tensor, y: Tensor) -> Choosing:
    hits, losses = grid.judge(x, y)
    return Choosing(hits.double().sum(0), losses.double().sum(0), len(x))


def test_a_planted_truth_is_learnt_and_the_inputs_that_hold_it_are_chosen() -> None:
    """The class stands in the block before the last three: only heads of four blocks see it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, WIDTH, generator=generator)
    y = x[:, :CLASSES].argmax(1)
    schedule = Schedule(64, 300)
    grid = Grid(inputs_of(DIM, BLOCKS, True), CLASSES, schedule.batch)

    def seen() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            rows = torch.randint(600, (64,), generator=generator)
            yield x[rows], y[rows]

    train(grid, seen(), schedule)
    chosen = choosing(grid, x[600:800], y[600:800])
    hits, _ = grid.judge(x[800:], y[800:])
    details = details_of(grid.heads, chosen, hits, schedule)
    assert details["head"].startswith("last 4 blocks") and details["rate"] >= 1e-2
    assert hits[:, chosen.best()].double().mean() > 0.9
    blind = [one["asked"] for one in details["heads"] if one["inputs"].startswith("last block")]
    assert len(blind) == 26 and max(blind) < 0.5  # a third is chance
    assert details["best_of_asked"] == max(one["asked"] for one in details["heads"])


def test_of_equal_heads_the_one_with_the_least_loss_is_chosen() -> None:
    hits, losses = torch.tensor([3.0, 5.0, 5.0, 5.0]), torch.tensor([0.0, 9.0, 8.0, 8.5])
    one = Choosing(hits.double(), losses.double(), 10)
    assert one.best() == 2
    both = one + Choosing(torch.tensor([9.0, 0, 0, 0]).double(), losses.double(), 10)
    assert both.best() == 0 and both.images == 20


def test_the_same_again_is_the_same() -> None:
    schedule = Schedule(32, 20)
    grids = [Grid(inputs_of(DIM, BLOCKS, True), CLASSES, 32) for _ in range(2)]
    for grid in grids:
        train(grid, batches(32), schedule)
    for a, b in zip(grids[0].weights, grids[1].weights, strict=True):
        assert torch.equal(a, b)


def test_a_schedule_ends_near_zero_and_knows_small_and_large_sets() -> None:
    assert Schedule.of(1_281_167) == Schedule(1024, 12_500)
    assert Schedule.of(45_000) == Schedule(1024, 1000)
    assert Schedule.of(200_000).steps == math.ceil(2_000_000 / 1024)
    assert Schedule.of(300) == Schedule(32, 1000)
    assert Schedule.of(45_000, ranks=3).batch == 1026
    schedule = Schedule(32, 100)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[0] == 1 and factors[50] == pytest.approx(0.5) and 0 < factors[99] < 1e-3


# ---- Two ranks.


def part_of(rank: int, size: int, shares: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's rows of the batches that one rank alone would see."""
    first = slice(0, shares[0]) if rank == 0 else slice(shares[0], sum(shares))
    for x, y in batches(size):
        yield x[first], y[first]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    try:
        out = []
        for shares in ((16, 16), (20, 12), (32, 0)):
            grid = Grid(inputs_of(DIM, BLOCKS, True), CLASSES, 32)
            train(grid, part_of(rank, 32, shares), Schedule(32, 40))
            out.append(grid.weights)
        torch.save(out, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.long
def test_two_ranks_are_one_with_the_same_batches(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    one = Grid(inputs_of(DIM, BLOCKS, True), CLASSES, 32)
    train(one, batches(32), Schedule(32, 40))
    for of_shares, of_other in zip(a, b, strict=True):  # even, uneven, and one without a row
        for mine, other, expected in zip(of_shares, of_other, one.weights, strict=True):
            assert torch.equal(mine, other)
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)


def test_a_head_whose_loss_is_no_number_is_not_chosen():
    """All its answers are the first class, which may be the most frequent one."""
    hits, losses = torch.tensor([5.0, 9.0, 5.0]), torch.tensor([1.0, torch.nan, 0.9])
    assert Choosing(hits.double(), losses.double(), 10).best() == 2
