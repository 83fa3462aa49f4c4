"""What a run takes before it starts: parameters, memory, disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

BYTES_F32 = 4
# Of the memory of a step on a CPU, measured: benchmarks/memory.py
LIBRARIES = (
    120 * 2**20
)  # bytes that torch and oneDNN take with the first step, whatever it computes
BACKWARD = 1.25  # gradients of activations and work space, as a factor on what backward needs


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


def vit_numbers(tokens: int, *, width: int, depth: int) -> float:
    """Numbers that a GPU keeps for backward of a view of so many tokens (CLS and registers
    included) in our ViT.

    Per block and token: inputs of 4 linear layers and 2 norms, GELU, attention output.
    """
    return tokens * depth * width * 17


def measured_numbers(backbone: nn.Module, channels: int, size: int) -> float:
    """The same of one view of `size` pixels through any backbone, counted on a copy without
    memory.
    """
    numbers = 0
    probe = copy.deepcopy(backbone).requires_grad_(False).to("meta").eval()

    def count(module: nn.Module, inputs: Any, out: Any) -> None:
        nonlocal numbers
        numbers += out.numel() if isinstance(out, Tensor) else 0

    for module in probe.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with torch.device("meta"):
        probe(torch.zeros(1, channels, size, size))
    return float(numbers)


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
