"""`apply_photometric` compiled, for training on an accelerator.

The compiled function has one graph for each shape, and compiling one takes a minute. Batches that
lost bad images are therefore filled up: all calls with crops of one size see as many crops.
"""

import torch
from torch import Tensor

from pipeline.views.photometric import PARAMS, PhotometricSpec, apply_photometric


class CompiledPhotometric:
    """Called like `apply_photometric`; the parameters are moved to where the crops are."""

    def __init__(self, backend: str = "inductor"):
        self._compiled = torch.compile(
            apply_photometric, fullgraph=True, dynamic=False, backend=backend
        )
        self._counts: dict[torch.Size, int] = {}

    def __call__(
        self,
        crops: Tensor,
        params: Tensor,
        spec: PhotometricSpec,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """See `apply_photometric`; the first call for a size of crops compiles."""
        count, size = len(crops), crops.shape[1:]
        if not count:
            return apply_photometric(crops, params.to(crops.device), spec, dtype)
        full = self._counts[size] = max(count, self._counts.get(size, 0))
        # Contiguous, as a change of strides would compile again. The copy of the parameters does
        # not make the host wait: the driver takes a few kilobytes at once.
        params = params.contiguous().to(crops.device, non_blocking=True)
        crops = crops.contiguous()
        if count < full:
            crops = torch.cat((crops, crops.new_zeros((full - count, *size))))
            params = torch.cat((params, params.new_zeros((full - count, PARAMS))))
        return self._compiled(crops, params, spec, dtype)[:count]
