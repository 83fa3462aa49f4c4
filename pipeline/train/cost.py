"""What a run costs before it starts: parameters, FLOPs, memory, disk."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

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


def estimate(
    student_parameters: int,
    backbone_parameters: int,
    *,
    width: int,
    depth: int,
    tokens_global: int,
    tokens_local: int,
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
    """Matrix products of backbone and heads, attention, prototypes; FLOPs good to a few percent.

    Tokens per crop include CLS and registers; masked patches are those of both global crops and go
    through the patch head, which may be the same one. A multiply-add is 2 FLOPs; backward costs
    twice the forward; the teacher only runs forward on the two global crops.
    """

    def forward(tokens: int, count: int) -> float:
        products = 2 * backbone_parameters * tokens
        attention = 4 * depth * tokens * tokens * width
        return count * (products + attention)

    head_patches = 2 * patch_head_parameters * masked_patches
    head_student = 2 * head_parameters * (2 + local_crops) + head_patches
    head_teacher = 2 * head_parameters * 2 + head_patches
    student = forward(tokens_global, 2) + forward(tokens_local, local_crops) + head_student
    teacher = forward(tokens_global, 2) + head_teacher
    tokens = micro_batch * (2 * tokens_global + local_crops * tokens_local)
    element = 2 if half else 4
    # per block and token: inputs of 4 linear layers and 2 norms, GELU, attention output
    activations = tokens * depth * width * 34 // 2 * element
    scores = (4 + local_crops) * prototypes + 2 * masked_patches * patch_prototypes
    logits = int(micro_batch * scores * BYTES_F32 * 2)
    return Cost(
        parameters=student_parameters,
        flops_per_image=3 * student + teacher,
        # student, its gradients, two moments and the teacher
        state_bytes=student_parameters * BYTES_F32 * 5,
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
