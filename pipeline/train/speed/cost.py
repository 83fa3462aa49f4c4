"""What a run costs before it starts: parameters, FLOPs, memory, disk."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

BYTES_F32 = 4
# Of the memory of a step on a CPU, measured: benchmarks/memory.py
LIBRARIES = (
    120 * 2**20
)  # bytes that torch and oneDNN take with the first step, whatever it computes
BACKWARD = 1.25  # gradients of activations and work space, as a factor on what backward needs
# Dense bf16 peaks without sparsity, FLOP/s, from the makers' data sheets.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Cost:
    """Bytes are those of one worker, except the checkpoint, which exists once.

    Only `micro_batch` differs between plans of one network, precision and device: `replace` gives
    the cost of another one.
    """

    parameters: int  # of the student, heads included
    flops_per_image: float
    micro_batch: int
    state_bytes: int
    activation_bytes_per_image: float
    batch_bytes_per_image: int
    checkpoint_bytes: int
    library_bytes: int = 0

    @property
    def activation_bytes(self) -> int:
        """Of a micro batch: what forward keeps, and the work space of backward."""
        return int(self.micro_batch * self.activation_bytes_per_image)

    @property
    def batch_bytes(self) -> int:
        """Of the views of a micro batch."""
        return self.micro_batch * self.batch_bytes_per_image

    @property
    def memory_bytes(self) -> int:
        """Expected peak on the training device, above that of a process without a network."""
        return self.state_bytes + self.activation_bytes + self.batch_bytes + self.library_bytes


class View(NamedTuple):
    """One view through a backbone: forward FLOPs, and numbers that a GPU keeps for backward."""

    flops: float
    activations: float


def vit_view(parameters: int, tokens: int, *, width: int, depth: int) -> View:
    """A view of so many tokens (CLS and registers included) in our ViT; FLOPs good to a
    few percent.

    Matrix products and attention; a multiply-add is 2 FLOPs.
    """
    products = 2 * parameters * tokens
    attention = 4 * depth * tokens * tokens * width
    # per block and token: inputs of 4 linear layers and 2 norms, GELU, attention output
    return View(products + attention, tokens * depth * width * 17)


def measured_view(backbone: nn.Module, channels: int, size: int) -> View:
    """One view of `size` pixels through any backbone, counted on a copy without memory."""
    numbers = 0
    probe = copy.deepcopy(backbone).requires_grad_(False).to("meta").eval()

    def count(module: nn.Module, inputs: Any, out: Any) -> None:
        nonlocal numbers
        numbers += out.numel() if isinstance(out, Tensor) else 0

    for module in probe.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    counter = FlopCounterMode(display=False)
    with counter, torch.device("meta"):
        probe(torch.zeros(1, channels, size, size))
    return View(float(counter.get_total_flops()), float(numbers))


def kept_for_backward(forward: Callable[[], object], dtype: torch.dtype | None) -> int:
    """Bytes of all tensors that a forward pass keeps for its backward pass, parameters included.

    Nothing is computed: tensors have shapes and no contents, so this takes a second or a few and no
    memory, whatever the network.

    Args:
        forward: makes its inputs, on the CPU, and runs the network on them.
        dtype: of autocast; None: it is off.
    """
    kept: dict[int, Tensor] = {}  # by storage, which several tensors may share

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def peak_flops(device: str, dtype: torch.dtype, threads: int) -> float:
    """Peak of one training device: from its data sheet, or measured on a CPU in 0.2 s."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return next((peak for key, peak in PEAKS.items() if key in name), 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best = 0.0
    for _ in range(12):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * 2048 * 1024 * 1024 / (time.perf_counter() - begin))
    torch.set_num_threads(before)
    return best
