"""The head against the reference's outputs, gradients and initial statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.model.head import Head

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
