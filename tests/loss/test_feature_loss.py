"""Features as targets: against plain loops, and torch's own statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.loss.features import LEAST_DEVIATION, Standard, feature_loss

COUNTS = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(s: list[float], t: list[float], form: str) -> float:
    if form == "cosine":
        product = sum(a * b for a, b in zip(s, t, strict=True))
        return 1 - product / math.sqrt(sum(a * a for a in s) * sum(b * b for b in t))
    apart = [abs(a - b) for a, b in zip(s, t, strict=True)]
    return sum(0.5 * d * d if d < 1 else d - 0.5 for d in apart) / len(apart)


@pytest.mark.parametrize("form", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("weights", [None, COUNTS])
def test_a_loss_is_the_mean_over_the_rows_that_count(form: str, weights: Tensor | None) -> None:
    s, t = 2 * draw(5, 7), draw(5, 7, seed=1)
    rows = [by_hand(*pair, form) for pair in zip(s.tolist(), t.tolist(), strict=True)]
    counts = torch.ones(5) if weights is None else weights
    counted = [x for x, w in zip(rows, counts, strict=True) if w]
    loss = feature_loss(s, t, weights, form)  # type: ignore[arg-type]
    assert float(loss) == pytest.approx(sum(counted) / len(counted), rel=1e-5)


@pytest.mark.parametrize("form", ["cosine", "smooth_l1"])
def test_no_row_that_counts_is_0_and_has_a_gradient(form: str) -> None:
    s = draw(3, 4).requires_grad_(True)
    loss = feature_loss(s, draw(3, 4, seed=1), torch.zeros(3), form)  # type: ignore[arg-type]
    loss.backward()
    assert float(loss.detach()) == 0 and s.grad is not None and not s.grad.any()


def test_shapes_and_forms_that_are_refused() -> None:
    for s, t, weights in ((draw(3, 4), draw(3, 5), None), (draw(3, 4), draw(3, 4), torch.ones(2))):
        with pytest.raises(PipelineError, match="feature_loss got features"):
            feature_loss(s, t, weights)
    with pytest.raises(PipelineError, match="unknown feature loss 'l2'"):
        feature_loss(draw(3, 4), draw(3, 4), None, "l2")  # type: ignore[arg-type]


def test_mean_and_deviation_are_those_of_all_rows_so_far() -> None:
    scales = torch.tensor([1.0, 100.0, 0.5]), torch.tensor([-3.0, 1000.0, 0.0])
    parts = [draw(n, 3, seed=n) * scales[0] + scales[1] for n in (4, 7, 1, 9)]
    standard = Standard(3)
    standard = standard.joined([standard.measure(x) for x in parts[:2]])
    standard = standard.joined([standard.measure(x) for x in parts[2:]])
    rows = torch.cat(parts).double()
    torch.testing.assert_close(standard.mean, rows.mean(0))
    torch.testing.assert_close(standard.squares / standard.count, rows.var(0, unbiased=False))
    made = standard.apply(torch.cat(parts))
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.std(0, unbiased=False), torch.ones(3), atol=1e-5, rtol=0)


def test_rows_of_weight_0_are_not_there() -> None:
    rows = draw(5, 3)
    weighted, alone = Standard(3), Standard(3)
    weighted = weighted.joined([weighted.measure(rows, COUNTS)])
    alone = alone.joined([alone.measure(rows[COUNTS > 0])])
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(weighted.state_dict()[name], value)


def test_what_hardly_changes_is_not_blown_up() -> None:
    rows = draw(50, 5)
    rows[:, 1] = 5.0  # never changes
    rows[:, 2] *= 1e-6
    standard = Standard(5)
    made = standard.joined([standard.measure(rows)]).apply(rows)
    assert not made[:, 1].any()
    deviation = rows.std(0, unbiased=False)
    least = LEAST_DEVIATION * deviation.median()
    assert float(made[:, 2].std(unbiased=False)) == pytest.approx(float(deviation[2] / least), 1e-4)
    dead = Standard(3)
    assert not dead.joined([dead.measure(torch.ones(4, 3))]).apply(torch.ones(4, 3)).any()


def test_another_width_is_refused() -> None:
    with pytest.raises(PipelineError, match="features are 4 wide, the teacher's 3"):
        Standard(3).load_state_dict(Standard(4).state_dict())
