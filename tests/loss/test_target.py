"""Teacher targets against the reference's numbers, and where the reference fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.loss import target as module
from pipeline.loss.centre import Centre
from pipeline.loss.target import sinkhorn_targets, softmax_targets

GOLDEN = Path(__file__).parents[1] / "golden"
DINO = torch.load(GOLDEN / "dino_loss.pt", weights_only=True)
IBOT = torch.load(GOLDEN / "ibot_loss.pt", weights_only=True)


def swapped(x: Tensor) -> Tensor:
    first, second = x.chunk(2)
    return torch.cat([second, first])


def plain_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """The textbook form, in double precision."""
    q = torch.exp(logits.double() / temperature).T
    prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True) * prototypes
        q /= q.sum(dim=0, keepdim=True) * rows
    return (q * rows).T.float()


def test_softmax_centring_is_late_by_one_step() -> None:
    for golden, rows, key in (
        (DINO, swapped, "teacher_probs_centered_swapped"),
        (IBOT, lambda x: x, "teacher_probs_centered"),
    ):
        centre = Centre(golden["K"], momentum=0.9)
        for step in golden["steps"]:
            used = centre.use()
            torch.testing.assert_close(used, step["center_used"].flatten(), rtol=1e-5, atol=1e-6)
            (target,) = softmax_targets([step["teacher_logits"]], used, step["teacher_temp"])
            centre.see([step["teacher_logits"]])
            ours = rows(target.probabilities())
            torch.testing.assert_close(ours, step[key], rtol=1e-4, atol=1e-6)
        expected = golden["center_final"].flatten()
        torch.testing.assert_close(centre.use(), expected, rtol=1e-5, atol=1e-6)


def test_sinkhorn() -> None:
    for step in DINO["steps"]:
        (target,) = sinkhorn_targets([step["teacher_logits"]], step["teacher_temp"])
        ours = swapped(target.probabilities())
        torch.testing.assert_close(
            ours, step["teacher_probs_sinkhorn_swapped"], rtol=1e-4, atol=1e-6
        )
    for step in IBOT["steps"]:
        (target,) = sinkhorn_targets([step["teacher_logits"]], step["teacher_temp"])
        torch.testing.assert_close(
            target.probabilities(), step["teacher_probs_sinkhorn"], rtol=1e-4, atol=1e-6
        )


def test_sinkhorn_where_the_reference_gives_nan() -> None:
    golden = DINO["overflow"]
    (target,) = sinkhorn_targets([golden["logits"]], golden["temp"])
    expected = plain_sinkhorn(golden["logits"], golden["temp"])
    assert torch.isfinite(expected).all()
    # Logits of 3.9 / 0.04 carry 1e-5 of fp32 rounding into the exponent.
    torch.testing.assert_close(target.probabilities(), expected, rtol=1e-3, atol=1e-6)
    (target,) = sinkhorn_targets([100 * golden["logits"]], golden["temp"])
    q = target.probabilities()
    assert torch.isfinite(q).all()
    torch.testing.assert_close(q.sum(dim=1), torch.ones(len(q)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_chunks_and_micro_batches_change_nothing(
    monkeypatch: pytest.MonkeyPatch, centring: str
) -> None:
    logits = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * 0.3
    centre = torch.linspace(-0.1, 0.1, 40)

    def targets(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        per_batch = (
            sinkhorn_targets(parts, 0.05)
            if centring == "sinkhorn"
            else softmax_targets(parts, centre, 0.05)
        )
        q = torch.cat([t.probabilities() for t in per_batch])
        return q, per_batch[0].entropy(), per_batch[0].prototypes_used()

    whole, entropy, used = targets([logits])
    torch.testing.assert_close(whole.sum(dim=1), torch.ones(24))
    torch.testing.assert_close(entropy, -(whole * whole.log()).sum(dim=1).mean())
    assert int(used) == len(whole.argmax(dim=1).unique())
    split, _, _ = targets([logits[:5], logits[5:5], logits[5:]])
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(module, "CHUNK", 100)
    chunked, entropy_again, used_again = targets([logits])
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(entropy_again, entropy)
    assert used == used_again


def test_the_pending_mean_survives_a_checkpoint() -> None:
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    whole, before = Centre(8), Centre(8)
    for centre in (whole, before):
        centre.use()
        centre.see([logits])
    resumed = Centre(8)
    resumed.load_state_dict(before.state_dict())
    assert torch.equal(resumed.use(), whole.use())
    assert whole.use().any()
    assert "pending" not in whole.state_dict()


def test_a_centre_without_rows_stays() -> None:
    centre = Centre(4)
    centre.value = torch.arange(4.0)
    centre.see([torch.empty(0, 4)])
    assert torch.equal(centre.use(), torch.arange(4.0))
    (target,) = sinkhorn_targets([torch.empty(0, 4)], 0.05)
    assert target.probabilities().shape == (0, 4)
