"""What a run takes before it starts: parameters, FLOPs, memory by what it is for, disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

GIB = 2**30
BYTES_F32 = 4
# Of the memory of a step on a CPU, measured: benchmarks/memory.py
LIBRARIES = 60 * 2**20  # bytes that torch and oneDNN take with the first step, whatever it does
BACKWARD = 0.25  # gradients of activations and work space, as a share of what backward needs
# Beside what torch allocates on a GPU: CUDA's context with its kernels, and NCCL's buffers. Round
# figures, not measured.
CONTEXT, NCCL = 600 * 2**20, 400 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes on the training device of one worker, at the peak of a step, by what they are for.

    What grows with the images is an image's; `images` of them are computed at once. With another
    micro batch (`of`) it is the memory of another plan of the same network, precision and device.
    """

    images: int  # of a micro batch
    accumulation: int  # micro batches of a step
    weights: int  # of the student
    gradients: int
    moments: int  # AdamW's two
    teacher: int  # and the frozen one
    copies: int  # of weights, for the backward pass: in bfloat16 under autocast, and prototypes
    gathered: int  # whole weights and gradients of what is at work, where they are split
    buckets: int  # of gradients that travel in another type
    activations: float  # what the student keeps for its backward pass
    logits: float  # of the student
    targets: float  # the teacher's logits; with sinkhorn of all micro batches
    targets_at_once: bool  # whether those of all micro batches are held
    views: float  # of a micro batch, on the device; all micro batches of a step are there
    ahead: bool  # whether the views of the next step are there too
    workspace: float  # gradients of activations and other work space
    libraries: int  # of a CPU: what torch and oneDNN take
    context: int  # of a GPU, outside of torch's own count

    def of(self, images: int, accumulation: int) -> Memory:
        """That of other micro batches."""
        return replace(self, images=images, accumulation=accumulation)

    def parts(self) -> dict[str, float]:
        """Bytes by name, the largest kinds first known by name; what is 0 is left out."""
        target_images = self.images * (self.accumulation if self.targets_at_once else 1)
        sizes = {
            "weights": self.weights,
            "gradients": self.gradients,
            "moments": self.moments,
            "teacher": self.teacher,
            "copies of weights": self.copies,
            "gathered weights": self.gathered,
            "buckets": self.buckets,
            "activations": self.images * self.activations,
            "logits and targets": self.images * self.logits + target_images * self.targets,
            "views": self.images * self.accumulation * self.views * (1 + self.ahead),
            "work space": self.images * self.workspace,
            "libraries": self.libraries,
        }
        return {name: size for name, size in sizes.items() if size}

    @property
    def state(self) -> int:
        """What does not grow with the images, but for libraries."""
        fixed = self.weights + self.gradients + self.moments + self.teacher
        return fixed + self.copies + self.gathered + self.buckets

    @property
    def allocated(self) -> float:
        """Expected peak of torch's own count on a GPU; on a CPU, above a process without a
        network.
        """
        return sum(self.parts().values())

    @property
    def total(self) -> float:
        """With what CUDA takes beside it."""
        return self.allocated + self.context

    def line(self) -> str:
        """For the log, in GiB."""
        parts = (f"{name} {size / GIB:.2f}" for name, size in self.parts().items())
        context = f"; CUDA and NCCL {self.context / GIB:.1f}" if self.context else ""
        return f"{', '.join(parts)}{context}"


@dataclass(frozen=True)
class Cost:
    """What a plan costs; memory is that of one worker, the checkpoint exists once."""

    parameters: int  # of the student, heads included
    flops_per_image: float
    checkpoint_bytes: int
    memory: Memory

    @property
    def memory_bytes(self) -> float:
        """Expected peak on the training device."""
        return self.memory.total


def kept_for_backward(
    forward: Callable[[], object], dtype: torch.dtype | None, weights: Iterable[Tensor]
) -> int:
    """Bytes of all tensors that a forward pass keeps for its backward pass, but for weights.

    Nothing is computed: tensors have shapes and no contents, so this takes a second or a few and no
    memory, whatever the network.

    Args:
        forward: makes its inputs, on the CPU, and runs the network on them.
        dtype: of autocast; None: it is off.
        weights: of the network, on the CPU.
    """
    kept: dict[int, Tensor] = {}  # by storage, which several tensors may share

    def keep(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):  # a weight as it is
            kept[storage(tensor)] = tensor
        return tensor

    def storage(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(weight) for weight in weights]  # of which there may be views
    known = {storage(fake) for fake in fakes}
    with (
        mode,
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        forward()
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in known)
