"""What the order of channels in memory and the type cost a small convolutional network on a CPU.

    python benchmarks/channels.py

Forward and backward pass of `pipeline/model/encoders/residual.py:small` on 128 images of 32 pixels,
one thread, in turn in one process; milliseconds of processor time of a pass: the second smallest
and the median of the rounds.
"""

from __future__ import annotations

import argparse
import time

import torch

from pipeline.model.encoders.residual import small


def seconds(network: torch.nn.Module, images: torch.Tensor, half: bool) -> float:
    """Processor time of one pass there and back."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = network(images)
    out.float().square().sum().backward()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(128, 3, 32, 32)
    last = images.contiguous(memory_format=torch.channels_last)
    weights_too = small().to(memory_format=torch.channels_last)
    cases = {"channels first": (small(), images), "channels last": (small(), last)}
    cases["weights too"] = (weights_too, last)
    took: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds):
        for name, (network, x) in cases.items():
            for half in (False, True):
                took.setdefault((name, half), []).append(seconds(network, x, half))
    for (name, half), each in took.items():
        times = sorted(each)
        kind = "bfloat16" if half else "float32"
        print(f"{name:15} {kind:9} {1e3 * times[1]:6.0f} {1e3 * times[len(times) // 2]:6.0f}")


if __name__ == "__main__":
    main()
