"""Which form of the losses computes: plain torch, or Triton kernels.

Both give the same numbers to rounding. The plain one is the reference, and what CPUs take.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Literal

from torch import Tensor

from pipeline.errors import PipelineError

Kernels = Literal["auto", "eager", "triton"]


def fused(kernels: Kernels, logits: Tensor) -> bool:
    """Whether Triton computes with these logits.

    `auto`: where Triton can: on CUDA devices, and on CPUs where TRITON_INTERPRET=1 has it
    interpreted, which is for tests.

    Raises:
        PipelineError: `triton` where it cannot, or another word.
    """
    if kernels not in ("auto", "eager", "triton"):
        raise PipelineError(f"loss kernels {kernels!r}", "use auto, eager or triton")
    if kernels == "eager":
        return False
    missing = f"the logits are on {logits.device}, and Triton computes on CUDA devices"
    if logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        missing = _missing()
    if missing and kernels == "triton":
        raise PipelineError(
            f"train.loss_kernels is triton, but {missing}",
            "set train.loss_kernels=auto, which takes Triton where it can",
        )
    return not missing


@cache
def _missing() -> str:
    """Why Triton cannot be had; empty where it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return ""
