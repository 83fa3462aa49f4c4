"""The head against the reference's outputs, gradients and initial statistics."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.model.head import Head, Norm, Norms

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "dino_head.pt", weights_only=True)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_output_and_gradients(layers: int) -> None:
    golden = GOLDEN[f"nlayers{layers}"]
    ctor = golden["ctor"]
    head = Head(
        ctor["in_dim"], ctor["out_dim"], ctor["bottleneck_dim"], ctor["hidden_dim"], ctor["nlayers"]
    )
    head.load_state_dict(golden["state_dict"])
    x = golden["x"].clone().requires_grad_()
    y = head(x)
    torch.testing.assert_close(y, golden["y"], rtol=1e-5, atol=2e-6)
    y.backward(golden["grad_out"])
    torch.testing.assert_close(x.grad, golden["grad_x"], rtol=1e-4, atol=1e-5)
    for name, gradient in golden["grad_params"].items():
        torch.testing.assert_close(head.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)


def test_initial_statistics() -> None:
    torch.manual_seed(0)
    state = Head(384, prototypes=16384).state_dict()  # fewer prototypes than the golden 65536
    for name, (mean, std, largest) in GOLDEN["init_stats_official_dims"].items():
        x = state[name]
        assert float(x.mean()) == pytest.approx(mean, abs=1e-4), name
        assert float(x.std()) == pytest.approx(std, rel=0.02, abs=1e-9), name
        assert float(x.abs().max()) == pytest.approx(largest, rel=0.3, abs=1e-9), name
    assert state["last_layer.weight_g"].shape == (16384, 1)


def test_logits_are_cosines_at_first() -> None:
    torch.manual_seed(0)
    logits = Head(16, 64, 8, 32)(100 * torch.randn(50, 16))
    assert float(logits.detach().abs().max()) <= 1 + 1e-5


def test_no_tokens_leave_every_parameter_in_the_graph() -> None:
    head = Head(16, 12, 8, 32)
    head(torch.zeros(0, 16)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_a_head_needs_a_layer() -> None:
    with pytest.raises(PipelineError, match="0 layers"):
        Head(16, layers=0)


def test_float32_logits_under_autocast() -> None:
    """Only the product with the prototypes is float32; the MLP before it stays in bfloat16."""
    torch.manual_seed(0)
    half, exact = Head(16, 64, 8, 32), Head(16, 64, 8, 32, float32=True)
    exact.load_state_dict(half.state_dict())
    x = torch.randn(50, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, logits = half(x), exact(x)
        bottleneck = torch.nn.functional.normalize(half.mlp(x).float(), dim=-1)
    assert rounded.dtype == torch.bfloat16 and logits.dtype == torch.float32
    weight = half.last_layer.weight_v / half.last_layer.weight_v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(logits, bottleneck @ weight.T)
    assert float((rounded.float() - logits).abs().max().detach()) > 1e-3


def reference(x: Tensor, state: dict[str, Tensor], norm: bool, input_norm: bool) -> Tensor:
    """A head of three layers in plain formulas, in training mode."""

    def normed(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
        mean, var = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = normed(x) if input_norm else x
    for layer in (0, 3) if norm else (0, 2):
        x = x @ state[f"mlp.{layer}.weight"].T + state.get(f"mlp.{layer}.bias", 0.0)
        if norm:
            x = normed(x, state[f"mlp.{layer + 1}.weight"], state[f"mlp.{layer + 1}.bias"])
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    last = "mlp.6" if norm else "mlp.4"
    x = x @ state[f"{last}.weight"].T + state[f"{last}.bias"]
    x = x / (x**2).sum(1, keepdim=True).sqrt()
    v = state["last_layer.weight_v"]
    rows = v / (v**2).sum(1, keepdim=True).sqrt() * state["last_layer.weight_g"]
    return x @ rows.T


@pytest.mark.parametrize("norms", list(itertools.product(("none", "batch"), repeat=2)))
def test_a_head_with_batch_norm_is_the_formula(norms: tuple[Norm, Norm]) -> None:
    torch.manual_seed(0)
    head = Head(16, 12, 8, 32, norms=Norms(*norms))
    for name, parameter in head.named_parameters():
        if name.startswith("mlp") and parameter.ndim == 1:
            nn.init.normal_(parameter)  # weights and biases of BatchNorm too
    x = 3 + 2 * torch.randn(40, 16)
    ours = head(x)
    expected = reference(x.double(), {n: t.double() for n, t in head.state_dict().items()},
                         *(norm == "batch" for norm in norms))  # fmt: skip
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_rows_that_fill_up_are_in_no_statistics() -> None:
    torch.manual_seed(0)
    head, other = (Head(16, 12, 8, 32, norms=Norms("batch", "batch")) for _ in range(2))
    other.load_state_dict(head.state_dict())
    x = torch.randn(20, 16)
    filled = torch.cat([x, 100 * torch.randn(7, 16)])
    torch.testing.assert_close(head(filled, 20)[:20], other(x))
    for name, value in head.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], msg=name)
    # and no gradient comes from them
    for each, rows in ((head, filled), (other, x)):
        each.zero_grad()
        each(rows, 20)[:20].square().sum().backward()
    for (name, one), two in zip(head.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_too_few_rows_leave_the_statistics_alone() -> None:
    torch.manual_seed(0)
    head = Head(16, 12, 8, 32, norms=Norms("batch", "batch"))
    before = {name: x.clone() for name, x in head.state_dict().items()}
    for rows in (0, 1):
        logits = head(torch.randn(rows, 16))
        logits.sum().backward()
        assert logits.shape == (rows, 12) and bool(torch.isfinite(logits).all())
    assert all(p.grad is not None for p in head.parameters())
    assert all(torch.equal(x, head.state_dict()[name]) for name, x in before.items())
