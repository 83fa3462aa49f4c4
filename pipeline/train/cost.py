"""What a run costs before it starts: parameters, FLOPs, memory, disk."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BYTES_F32 = 4
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
    """Bytes are those of one worker, except the checkpoint, which exists once."""

    parameters: int  # of the student, heads included
    flops_per_image: float
    state_bytes: int
    activation_bytes: int
    batch_bytes: int
    checkpoint_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Expected peak on the training device."""
        return self.state_bytes + self.activation_bytes + self.batch_bytes


class View(NamedTuple):
    """One view through a backbone: forward FLOPs, and numbers kept for the backward pass."""

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


def estimate(
    student_parameters: int,
    *,
    global_view: View,
    local_view: View,
    target_view: View,
    frozen_parameters: int = 0,
    local_crops: int,
    prototypes: int,
    head_parameters: int,
    patch_prototypes: int,
    patch_head_parameters: int,
    masked_patches: float,
    micro_batch: int,
    view_bytes: int,
    half: bool,
) -> Cost:
    """Backbones, heads and prototypes of one step.

    Masked patches are those of both global crops and go through the patch head, which may be the
    same one. Backward costs twice the forward; the teacher (or the frozen one, `target_view`) only
    runs forward on the two global crops. A frozen teacher's heads are taken to be the student's.
    """
    head_patches = 2 * patch_head_parameters * masked_patches
    head_student = 2 * head_parameters * (2 + local_crops) + head_patches
    head_teacher = 2 * head_parameters * 2 + head_patches
    student = 2 * global_view.flops + local_crops * local_view.flops + head_student
    teacher = 2 * target_view.flops + head_teacher
    element = 2 if half else 4
    kept = 2 * global_view.activations + local_crops * local_view.activations
    activations = int(micro_batch * kept * element)
    scores = (4 + local_crops) * prototypes + 2 * masked_patches * patch_prototypes
    logits = int(micro_batch * scores * BYTES_F32 * 2)
    return Cost(
        parameters=student_parameters,
        flops_per_image=3 * student + teacher,
        # student, its gradients, two moments and the teacher
        state_bytes=(student_parameters * 5 + frozen_parameters) * BYTES_F32,
        activation_bytes=activations + logits,
        batch_bytes=micro_batch * view_bytes * (3 + element),
        checkpoint_bytes=student_parameters * BYTES_F32 * 4,
    )


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
