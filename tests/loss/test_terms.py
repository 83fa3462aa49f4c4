"""DINO, iBOT and KoLeo against the reference's numbers and against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.loss import target as target_module
from pipeline.loss.centre import Centre
from pipeline.loss.dino import dino_loss
from pipeline.loss.ibot import ibot_loss, patch_weights
from pipeline.loss.koleo import koleo
from pipeline.loss.prototypes import Span, cross_entropy
from pipeline.loss.target import Target, sinkhorn_targets, softmax_targets

GOLDEN = Path(__file__).parents[1] / "golden"
DINO = torch.load(GOLDEN / "dino_loss.pt", weights_only=True)
IBOT = torch.load(GOLDEN / "ibot_loss.pt", weights_only=True)
KOLEO = torch.load(GOLDEN / "koleo.pt", weights_only=True)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def target_of(probabilities: Tensor) -> Target:
    """A target with these very probabilities."""
    rows, prototypes = probabilities.shape
    return Target(probabilities.log(), 1.0, torch.zeros(prototypes), torch.zeros(rows))


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_dino(step: int, centring: str) -> None:
    golden = DINO["steps"][step]
    teacher, temperature = golden["teacher_logits"], golden["teacher_temp"]
    suffix = ""
    if centring == "softmax":
        (target,) = softmax_targets([teacher], golden["center_used"].flatten(), temperature)
    else:
        (target,) = sinkhorn_targets([teacher], temperature)
        suffix = "_sinkhorn"
    logits = leaf(torch.cat([golden["student_global_logits"], golden["student_local_logits"]]))
    global_term, local_term = dino_loss(logits, target, DINO["n_local"])
    expected = golden[f"dino_global_crops_loss{suffix}"]
    torch.testing.assert_close(global_term.detach(), expected, rtol=2e-5, atol=0)
    expected = golden[f"dino_local_crops_loss{suffix}"]
    torch.testing.assert_close(local_term.detach(), expected, rtol=2e-5, atol=0)
    if centring == "softmax":
        (global_term + local_term).backward()
        gradient = torch.cat([golden["grad_student_global"], golden["grad_student_local"]])
        torch.testing.assert_close(logits.grad, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("global_crops", "local_crops"), [(2, 0), (2, 3), (3, 0), (3, 2), (5, 1)])
def test_dino_is_the_plain_loop(
    global_crops: int, local_crops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "CHUNK", 25)  # two images at a time
    generator = torch.Generator().manual_seed(0)
    images, prototypes = 5, 11
    crops = global_crops + local_crops
    q = torch.rand(global_crops * images, prototypes, generator=generator).softmax(dim=1)
    s = leaf(torch.randn(crops * images, prototypes, generator=generator))
    global_term, local_term = dino_loss(s, target_of(q), local_crops, global_crops=global_crops)
    students = s.view(crops, images, prototypes)
    targets = q.view(global_crops, images, prototypes)
    pairs = [(crop, g) for crop in range(crops) for g in range(global_crops) if crop != g]
    loops = [torch.zeros(()), torch.zeros(())]
    for crop, g in pairs:
        pair = -(targets[g] * (students[crop] / 0.1).log_softmax(dim=1)).sum(dim=1).mean()
        term = int(crop >= global_crops)
        loops[term] = loops[term] + pair / len(pairs)
    torch.testing.assert_close(global_term, loops[0])
    torch.testing.assert_close(local_term, loops[1])
    (plain_gradient,) = torch.autograd.grad(3 * loops[0] + 2 * loops[1], s)
    (ours,) = torch.autograd.grad(3 * global_term + 2 * local_term, s)
    torch.testing.assert_close(ours, plain_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("step", [0, 1])
def test_ibot(step: int, centring: str) -> None:
    golden = IBOT["steps"][step]
    masks, masked = IBOT["masks"], IBOT["masks"].flatten().nonzero().squeeze(1)
    assert torch.equal(masked, IBOT["mask_indices_list"])
    weights = patch_weights(masks, masked)
    torch.testing.assert_close(weights * len(masks), IBOT["masks_weight"])
    teacher, temperature = golden["teacher_logits"], golden["teacher_temp"]
    if centring == "softmax":
        (target,) = softmax_targets([teacher], golden["center_used"].flatten(), temperature)
    else:
        (target,) = sinkhorn_targets([teacher], temperature)
    logits = leaf(golden["student_logits"])
    loss = ibot_loss(logits, target, weights)
    expected = golden["loss" if centring == "softmax" else "loss_sinkhorn"]
    torch.testing.assert_close(loss.detach(), expected, rtol=2e-5, atol=0)
    if centring == "softmax":
        loss.backward()
        torch.testing.assert_close(logits.grad, golden["grad_student"], rtol=1e-4, atol=1e-7)


def test_ibot_over_dense_tokens() -> None:
    golden = IBOT["dense_forward"]
    masked = IBOT["masks"].flatten().nonzero().squeeze(1)
    student = golden["student"].flatten(0, 1)[masked]
    target = target_of(golden["teacher_probs"].flatten(0, 1)[masked])
    loss = ibot_loss(student, target, patch_weights(IBOT["masks"], masked))
    torch.testing.assert_close(loss, golden["loss"], rtol=2e-5, atol=0)


def test_ibot_without_masked_patches_is_zero_with_a_gradient() -> None:
    logits = torch.empty(0, 7, requires_grad=True)
    masks = torch.zeros(4, 9, dtype=torch.bool)
    weights = patch_weights(masks, masks.flatten().nonzero().squeeze(1))
    (target,) = sinkhorn_targets([torch.empty(0, 7)], 0.05)
    loss = ibot_loss(logits, target, weights)
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_lose_only_their_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=generator) * 0.3
    q = torch.randn(6, 300, generator=generator).softmax(dim=1)
    exact, rounded = leaf(logits), leaf(logits.to(dtype))
    weights = torch.full((6,), 1 / 6)
    losses = [ibot_loss(x, target_of(q), weights) for x in (exact, rounded)]
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=0)
    assert losses[1].dtype == torch.float32
    torch.autograd.backward(losses)
    assert rounded.grad.dtype == dtype
    torch.testing.assert_close(rounded.grad.float(), exact.grad, rtol=0.1, atol=2e-4)


def test_pieces_are_weighted_sums_of_plain_cross_entropies() -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.rand(4, 5, generator=generator)  # rows need not sum to 1
    weight = torch.rand(2, generator=generator)
    spans = [
        Span(target_of(q[2:]), weight, (1,), first=3),
        Span(target_of(q[:2]), torch.full((2,), 0.3), (0,)),
    ]
    logits = leaf(torch.randn(6, 5, generator=generator))
    log_p = (logits / 0.5).log_softmax(dim=1)
    plain = torch.stack(
        [
            -0.3 * (q[:2] * log_p[:2]).sum(),
            -(weight[:, None] * q[2:] * log_p[3:5]).sum(),
        ]
    )
    sums = cross_entropy(logits, spans, 2, 0.5)
    torch.testing.assert_close(sums, plain)
    upstream = torch.tensor([2.0, -0.7])
    (plain_gradient,) = torch.autograd.grad(plain, logits, upstream)
    (ours,) = torch.autograd.grad(sums, logits, upstream)
    torch.testing.assert_close(ours, plain_gradient)
    assert not ours[[2, 5]].any()


def test_a_gradient_of_the_gradient_is_refused_not_wrong() -> None:
    logits = leaf(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    target = target_of(torch.full((4, 3), 1 / 3))
    (loss,) = cross_entropy(logits, [Span(target, torch.ones(4), (0,))], 1)
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        torch.autograd.grad(loss, logits, create_graph=True)
    torch.autograd.grad(loss, logits)


def test_a_network_that_needs_its_logits_is_told_that_they_were_overwritten() -> None:
    logits = leaf(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))).tanh()
    target = target_of(torch.full((4, 3), 1 / 3))
    (loss,) = cross_entropy(logits, [Span(target, torch.ones(4), (0,))], 1, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_is_refused_not_wrong() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    sums = cross_entropy(logits, [Span(target_of(torch.ones(2, 3)), torch.ones(2), (0,))], 1)
    sums.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        sums.sum().backward()


@pytest.mark.parametrize("name", sorted(KOLEO))
def test_koleo(name: str) -> None:
    golden = KOLEO[name]
    x = leaf(golden["x"])
    loss = koleo(x)
    torch.testing.assert_close(loss.detach(), golden["loss"], rtol=2e-5, atol=1e-6)
    loss.backward()
    if name != "with_duplicate":  # there the gradient is the direction of a rounding error
        torch.testing.assert_close(x.grad, golden["grad"], rtol=1e-3, atol=1e-6)
    assert torch.isfinite(x.grad).all()


def test_shapes_that_do_not_fit_are_refused_with_both_shapes() -> None:
    """Each of these gave another loss, or a traceback of torch."""
    x, target = torch.randn, target_of(torch.rand(6, 5).softmax(dim=1))
    ones = torch.ones(6)
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: koleo(x(1, 1, 16, 8)), "features [1, 1, 16, 8], expected rows [B, D]"),
        (lambda: koleo(x(8)), "features [8], expected rows [B, D]"),
        (lambda: dino_loss(x(9, 5), target, 1, global_crops=1), "6 rows for 1 global"),
        (lambda: dino_loss(x(9, 5), target, 1, global_crops=4), "6 rows for 4 global"),
        (lambda: dino_loss(x(9, 5), target, 2), "logits [9, 5] for a target [6, 5], expected [12"),
        (lambda: dino_loss(x(2, 9, 5), target, 1), "logits [2, 9, 5] for a target [6, 5]"),
        (lambda: dino_loss(x(9, 4), target, 1), "logits [9, 4] for a target [6, 5], expected [9"),
        (lambda: ibot_loss(x(7, 5), target, ones), "logits [7, 5] for a target [6, 5]"),
        (lambda: ibot_loss(x(6, 5), target, ones[:1]), "weights [1], expected [6]"),
        (lambda: ibot_loss(x(6, 5), target, ones[:, None]), "weights [6, 1], expected [6]"),
        (lambda: patch_weights(torch.ones(2, 2, 4) > 0, torch.arange(3)), "masks [2, 2, 4]"),
        (lambda: patch_weights(torch.ones(2, 4) > 0, torch.ones(2, 4) > 0), "torch.bool"),
        (lambda: sinkhorn_targets(x(6, 5), 0.05), "logits [6, 5], expected a list of [N, K]"),
        (lambda: sinkhorn_targets([x(6, 5), x(6, 4)], 0.05), "logits [[6, 5], [6, 4]]"),
        (lambda: sinkhorn_targets([], 0.05), "logits [], expected a list"),
        (lambda: sinkhorn_targets([x(6, 5)], 0.0), "temperature of 0.0"),
        (lambda: softmax_targets([x(6, 5)], x(1, 5), 0.05), "centre [1, 5] for logits of 5"),
        (lambda: softmax_targets([x(6, 5)], x(1), 0.05), "centre [1] for logits of 5"),
        (lambda: softmax_targets(x(6, 5), x(5), 0.05), "logits [6, 5], expected a list"),
        (lambda: Centre(4).see([x(6, 5)]), "5 prototypes for a centre of 4"),
        (lambda: Centre(5).see(x(6, 5)), "logits [6, 5], expected a list"),
    ]
    for call, said in refused:
        with pytest.raises(PipelineError) as error:
            call()
        assert said in error.value.what and error.value.hint


HARD: list[tuple[str, Callable[[], Tensor]]] = [
    ("all equal", lambda: torch.ones(4, 8)),
    ("zeros", lambda: torch.zeros(3, 8)),
    ("one row", lambda: torch.ones(1, 8)),
    ("no row", lambda: torch.empty(0, 8)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "make"), HARD, ids=[name for name, _ in HARD])
def test_koleo_stays_finite(name: str, make: Callable[[], Tensor], dtype: torch.dtype) -> None:
    if name == "zeros" and dtype == torch.float16:
        pytest.skip("the length of 0 has a slope beyond fp16; a norm precedes KoLeo in training")
    x = leaf(make().to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo(x)
    loss.backward()
    assert torch.isfinite(loss) and loss.dtype == torch.float32
    assert x.grad is not None and torch.isfinite(x.grad).all()
