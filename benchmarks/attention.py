"""Attention on a CPU: torch's fused kernel against the products written out, forward and backward.

    python benchmarks/attention.py

The two are measured in turn, one thread; the ratio is what counts (model/block.py, _attend).
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

SHAPES = ((128, 2, 66, 64), (256, 2, 18, 64), (16, 6, 261, 64))  # views, heads, tokens, width
ROUNDS = 7


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


def seconds(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> float:
    begin = time.perf_counter()
    attend(*inputs).sum().backward()
    return time.perf_counter() - begin


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}")
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            fused, plain = [], []
            for _ in range(ROUNDS + 1):
                fused.append(seconds(functional.scaled_dot_product_attention, inputs))
                plain.append(seconds(written_out, inputs))
            ratios = sorted(f / p for f, p in zip(fused[1:], plain[1:], strict=True))
            print(
                f"{shape} {dtype!s:15} fused {1e3 * statistics.median(fused[1:]):7.1f} ms, "
                f"written out {1e3 * statistics.median(plain[1:]):7.1f} ms, ratio "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )


if __name__ == "__main__":
    main()
