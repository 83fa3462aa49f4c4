"""A frozen network whose features a student learns, and the adapter between their widths.

V views of S pixels, T side of the teacher's images, P patches, D width of the teacher's features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import PipelineError, one_line

AT_ONCE = 64  # images that a network outside of torch is given in one call


class Features(NamedTuple):
    """What a teacher says of views, fp32."""

    cls: Tensor  # [V, D], CLS or pooled
    patches: Tensor | None  # [V * P, D'] on the grid that was asked for, view by view, row by row


class Adapter(nn.Module):
    """From the student's normed tokens to the teacher's widths: LayerNorm and a linear layer, one
    for CLS and one for patches, each where it is asked for.

    Thrown away after training, like a head. It is this shallow so that what is learnt is in the
    backbone and not in the adapter.
    """

    def __init__(self, width: int, cls_width: int, patch_width: int) -> None:
        """Draws from torch's global generator.

        Args:
            width: of the student.
            cls_width: of the teacher's CLS token; 0: it is not learnt.
            patch_width: the same of its patches.
        """
        super().__init__()
        self.cls = _projection(width, cls_width) if cls_width else None
        self.patch = _projection(width, patch_width) if patch_width else None

    def forward(self, cls: Tensor, patches: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """CLS `[V, d]` and patches `[N, d]` to the teacher's widths; None where it is not asked."""
        return (
            None if self.cls is None else self.cls(cls),
            None if self.patch is None else self.patch(patches),
        )


def _projection(width: int, wanted: int) -> nn.Sequential:
    linear = nn.Linear(width, wanted)
    nn.init.trunc_normal_(linear.weight, std=width**-0.5)  # targets have deviation 1
    nn.init.zeros_(linear.bias)
    layers = nn.Sequential()
    layers.add_module("norm", nn.LayerNorm(width))
    layers.add_module("linear", linear)
    return layers


class OutsideNetwork(nn.Module):
    """A network that torch does not run, such as a session of ONNX, under the names of a backbone.

    Images leave torch as arrays on the CPU, and what comes back goes to their device.
    """

    def __init__(
        self, run: Callable[[Any], Mapping[str, Any]], device: str, weight_bytes: int
    ) -> None:
        """Wrap a network.

        Args:
            run: values 0 to 1, float32 array [b, T, T, C], to `cls` [b, D] and, where it has them,
                `patches` [b, P, D].
            device: where it computes, `cuda` or `cpu`.
            weight_bytes: of its files.
        """
        super().__init__()
        self.run, self.device, self.weight_bytes = run, device, weight_bytes

    def forward_features(self, x: Tensor) -> dict[str, Tensor | None]:
        """Values 0 to 1, `[V, C, T, T]`."""
        pixels = x.float().permute(0, 2, 3, 1).contiguous().cpu()
        parts = [self.run(part.numpy()) for part in torch.split(pixels, AT_ONCE)]

        def joined(name: str) -> Tensor | None:
            if name not in parts[0]:
                return None
            return torch.cat([torch.as_tensor(part[name]).float() for part in parts]).to(x.device)

        return {"x_norm_clstoken": joined("cls"), "x_norm_patchtokens": joined("patches")}


class FeatureTeacher(nn.Module):
    """A frozen network, asked for its features of the student's global views: these are normalised
    as its own images were and brought to their size (bilinear, antialiased); its patches come back
    on the student's grid (the same filter).

    Attributes:
        network: a backbone of ours or of timm, or an `OutsideNetwork`.
        name: for messages.
        size: T, pixels.
        width: D of CLS.
        patch_width: D of patches; 0: it has none.
        grid: rows and columns of its patches; (0, 0) without.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str,
        size: int,
        taken: tuple[Sequence[float], Sequence[float]],
        given: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        """Freeze a network and ask it for one black image.

        Args:
            network: has `forward_features`.
            name: for messages.
            size: T.
            taken: mean and deviation of each channel with which its own images were normalised.
            given: those of the student's views.

        Raises:
            PipelineError: other numbers of channels, or it takes no images of this size.
        """
        super().__init__()
        (mean, std), (view_mean, view_std) = taken, given
        if len(mean) != len(view_mean):
            raise PipelineError(
                f"the teacher {name} takes images of {len(mean)} channels, the student's have "
                f"{len(view_mean)}",
                "name a teacher that was trained on images of as many channels "
                f"(model.in_channels={len(view_mean)})",
            )
        self.network = network.requires_grad_(False).eval()
        self.name, self.size = name, size
        self.scale: Tensor
        self.shift: Tensor
        own_mean, own_std, their_mean, their_std = (
            torch.tensor(values, dtype=torch.float32)[:, None, None]
            for values in (mean, std, view_mean, view_std)
        )
        self.register_buffer("scale", their_std / own_std, persistent=False)
        self.register_buffer("shift", (their_mean - own_mean) / own_std, persistent=False)
        try:
            with torch.no_grad():
                out = self._ask(torch.zeros(1, len(mean), size, size))
        except (RuntimeError, AssertionError, ValueError, PipelineError) as error:
            raise PipelineError(
                f"the teacher {name} takes no images of {size} x {size} pixels: {one_line(error)}",
                "set distill.image_size to a size that it takes, or leave it out",
            ) from error
        cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"]
        assert cls is not None
        self.width = int(cls.shape[-1])
        side = round(patches.shape[1] ** 0.5) if patches is not None else 0
        square = patches is not None and side * side == patches.shape[1]
        self.grid = (side, side) if square else (0, 0)
        self.patch_width = int(patches.shape[-1]) if patches is not None and square else 0

    @property
    def outside(self) -> bool:
        """Whether torch does not run it."""
        return isinstance(self.network, OutsideNetwork)

    @property
    def weight_bytes(self) -> int:
        """Of its weights in memory."""
        if isinstance(self.network, OutsideNetwork):
            return self.network.weight_bytes
        return sum(parameter.nbytes for parameter in self.network.parameters())

    def _ask(self, x: Tensor) -> dict[str, Tensor | None]:
        out: dict[str, Tensor | None] = self.network.forward_features(x)  # type: ignore[operator]
        return out

    @torch.no_grad()
    def forward(self, views: Tensor, grid: tuple[int, int] | None) -> Features:
        """Features of the student's views.

        Args:
            views: `[V, C, S, S]`, as the student sees them but for what is hidden from it.
            grid: rows and columns of the student's patches; None: patches are not wanted.
        """
        x = torch.addcmul(self.shift, views.float(), self.scale)
        if x.shape[-1] != self.size:
            x = resampled(x, (self.size, self.size))
        out = self._ask(x)
        cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"]
        assert cls is not None
        if grid is None or patches is None or not self.patch_width:
            return Features(cls.float(), None)
        maps = patches.float().transpose(1, 2)
        maps = maps.view(*maps.shape[:2], *self.grid)
        if grid != self.grid:
            maps = resampled(maps, grid)
        return Features(cls.float(), maps.flatten(2).transpose(1, 2).flatten(0, 1))


def resampled(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps `[B, D, h, w]` at another size: bilinear, and antialiased where they become smaller."""
    return F.interpolate(maps, size=grid, mode="bilinear", antialias=True)
