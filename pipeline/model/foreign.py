"""Backbones that are not ours: what they have in common, and timm models; others are in
`encoders/module.py`.

They offer what `VisionTransformer` offers to the rest: `encode` for training, `forward` and
`forward_features` for evaluation. Views of different sizes go through them one after the other.
B views, N tokens, P patches, D width.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError, one_line, shortened
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.vit import check_masks

NOT_HIDDEN = "iBOT needs patch tokens that can be hidden, and this encoder has none"
NO_IBOT = "set loss.ibot_weight=0 and loss.mask_probability=0"
Features = tuple[Tensor, Tensor | None]  # CLS or pooled [B, D], patch tokens [B, P, D] if any


class ForeignBackbone(nn.Module):
    """What timm models and free modules have in common; see the sub-classes.

    `has_patches` says whether there are patch tokens, `takes_masks` whether some can be hidden,
    which iBOT needs; without that a run trains with DINO and KoLeo only.
    """

    def __init__(self, module: nn.Module, width: int, patch_size: int, has_patches: bool) -> None:
        super().__init__()
        self.module = module
        self.width, self.patch_size, self.has_patches = width, patch_size, has_patches
        self.takes_masks = has_patches
        self.convolutional = any(map(_is_dense, module.modules()))

    def features(self, x: Tensor, masks: Tensor | None) -> Features:
        """Views `[B, C, H, W]`, bool masks `[B, P]` or None, to CLS and patch tokens."""
        raise NotImplementedError

    def encode(
        self,
        inputs: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        masked: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As `VisionTransformer.encode`: `[R + M, D]`, the CLS of all views, then the patches at
        `masked` of the first group.

        Raises:
            PipelineError: patches are asked for and there are none.
        """
        with _keyed(generator if self.training else None, inputs[0].device):
            encoded = [
                self.features(self._arranged(x), mask)
                for x, mask in zip(inputs, masks, strict=True)
            ]
        cls = torch.cat([each for each, _ in encoded])
        if not len(masked):
            return cls
        patches = encoded[0][1] if self.has_patches else None
        if patches is None:
            raise PipelineError(NOT_HIDDEN, NO_IBOT)
        if masks[0] is not None:
            check_masks(masks[0], patches)
        return torch.cat([cls, patches.flatten(0, 1).index_select(0, masked)])

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Tensor | None]:
        """CLS (or pooled) feature and patch tokens under the names of `VisionTransformer`."""
        cls, patches = self.features(x, masks)
        return {"x_norm_clstoken": cls, "x_norm_patchtokens": patches, "masks": masks}

    def forward(self, x: Tensor) -> Tensor:
        """The feature `[B, D]` of views `[B, C, H, W]`."""
        return self.features(x, None)[0]

    def _arranged(self, x: Tensor) -> Tensor:
        """Views with their channels last in memory where dense convolutions on a CPU come next:
        their kernels are faster so, and hand the order on. In training alone: other kernels round
        otherwise, and evaluations and exports are held against the library's own bits.
        """
        if self.convolutional and x.device.type == "cpu":
            return x.contiguous(memory_format=torch.channels_last)
        return x

    @property
    def has_layers(self) -> bool:
        """Whether there are layers for layerwise learning rates."""
        return False

    def layers(self) -> tuple[dict[str, int], int]:
        """Layer of each parameter for layerwise learning rates, and the number of the last layer;
        here all are the last one.
        """
        return {}, 0


@dataclass(frozen=True)
class TimmSpec:
    """A timm model by name, freshly initialised."""

    name: str  # without `timm:`
    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    drop_path: float = 0.0

    def build(self) -> TimmBackbone:
        """The model, drawn from torch's global generator.

        Raises:
            PipelineError: timm is missing, has no such model, or its patches have another size.
        """
        module, arguments = _create(self)
        backbone = TimmBackbone(module, self, arguments)
        if backbone.has_patches and backbone.stride != self.patch_size:
            raise PipelineError(
                f"timm:{self.name} has patches of {backbone.stride} pixels, not {self.patch_size}",
                f"set model.patch_size={backbone.stride}",
            )
        return backbone


class TimmBackbone(ForeignBackbone):
    """A timm model. ViTs hide masked patches with a mask token after their patch embedding."""

    def __init__(self, module: Any, spec: TimmSpec, arguments: Mapping[str, Any]) -> None:
        width = int(getattr(module, "head_hidden_size", 0) or module.num_features)
        embed = getattr(module, "patch_embed", None)
        size = getattr(embed, "patch_size", None)
        tokens = isinstance(getattr(module, "blocks", None), nn.Module) and size is not None
        super().__init__(module, width, spec.patch_size, False)
        self.spec, self.arguments = spec, arguments  # what timm was called with, for the export
        self.stride = int(size[0]) if tokens and isinstance(size, tuple) else 0
        self.prefix_tokens = int(getattr(module, "num_prefix_tokens", 0))
        self._masks: Tensor | None = None
        if self.stride and self._gives_tokens():
            self.has_patches = self.takes_masks = True
            self.mask_token = nn.Parameter(torch.zeros(1, width))
            embed.register_forward_hook(self._hide)  # type: ignore[union-attr]

    def _gives_tokens(self) -> bool:
        side = self.spec.image_size // self.stride * self.stride
        was = self.module.training
        with torch.no_grad():
            x = torch.zeros(1, self.spec.in_channels, side, side)
            out = self.module.eval().forward_features(x)  # type: ignore[operator]
        self.module.train(was)
        expected = (side // self.stride) ** 2 + self.prefix_tokens
        return isinstance(out, Tensor) and tuple(out.shape) == (1, expected, self.width)

    def _hide(self, embed: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        if self._masks is None:
            return out
        flat = out.flatten(1, 2) if out.dim() == 4 else out  # some keep the grid, [B, h, w, D]
        check_masks(self._masks, flat)
        hidden = torch.where(self._masks[..., None], self.mask_token.to(flat.dtype), flat)
        return hidden.view(out.shape)

    def features(self, x: Tensor, masks: Tensor | None) -> Features:
        """See `ForeignBackbone`."""
        self._masks = masks if self.has_patches else None
        try:
            out = self.module.forward_features(x)  # type: ignore[operator]
        finally:
            self._masks = None
        cls = self.module.forward_head(out, pre_logits=True)  # type: ignore[operator]
        return cls, out[:, self.prefix_tokens :] if self.has_patches else None

    @property
    def has_layers(self) -> bool:
        """Whether timm knows the layers of this model, for layerwise learning rates."""
        return hasattr(self.module, "group_matcher")

    def resized_position(self, position: Tensor) -> Tensor:
        """Position embeddings `[1, N, D]` of another image size for this one."""
        from timm.layers.pos_embed import resample_abs_pos_embed

        module: Any = self.module
        resized: Tensor = resample_abs_pos_embed(
            position,
            new_size=list(module.patch_embed.grid_size),
            num_prefix_tokens=0 if module.no_embed_class else self.prefix_tokens,
        )
        return resized

    def layers(self) -> tuple[dict[str, int], int]:
        """Timm's own layers of the model: stem 0, then block by block."""
        from timm.models import group_parameters

        if not self.has_layers:
            return {}, 0
        matcher = self.module.group_matcher(coarse=False)  # type: ignore[operator]
        names = group_parameters(self.module, matcher, reverse=True)
        return {"mask_token": 0} | {
            f"module.{name}": int(layer) for name, layer in names.items()
        }, max(int(layer) for layer in names.values())


def timm_by_name(
    name: str, arguments: Mapping[str, Any] | None = None, pretrained: bool = False
) -> TimmBackbone:
    """A timm model with the image size, patches and width that it has by itself.

    Args:
        name: timm's, e.g. `vit_small_patch16_224`; also `local-dir:<folder>`.
        arguments: more of `timm.create_model`; `num_classes` is 0 whatever they say.
        pretrained: with timm's weights, which it fetches where this machine has them not.

    Raises:
        PipelineError: timm is missing, has no such model, does not take the arguments, or gets no
            weights.
    """
    options = dict(arguments or {}) | {"num_classes": 0}
    timm = _timm(name)
    for extra in ({"dynamic_img_size": True}, {}):  # only some families take it: crops differ
        try:
            module = timm.create_model(name, pretrained=pretrained, **(extra | options))
            break
        except TypeError as error:
            reason: Exception = error
        except Exception as error:  # of its hub, of a file, of weights that do not fit
            what = "has no weights that can be fetched" if pretrained else "could not be built"
            raise PipelineError(
                f"timm:{name} {what}: {shortened(one_line(error))}",
                "check the network, or name a folder with its weights: timm:local-dir:<folder>"
                if pretrained
                else "give other encoder_kwargs",
            ) from error
    else:
        raise PipelineError(
            f"timm:{name} does not take {options}: {one_line(reason)}", "give other encoder_kwargs"
        ) from reason
    embed = getattr(module, "patch_embed", None)
    size = getattr(embed, "img_size", None) or module.pretrained_cfg["input_size"][1:]
    patch = getattr(embed, "patch_size", None)
    spec = TimmSpec(
        name,
        image_size=int(size[0]),
        patch_size=int(patch[0]) if isinstance(patch, tuple) else TimmSpec.patch_size,
        in_channels=int(options.get("in_chans", module.pretrained_cfg["input_size"][0])),
    )
    return TimmBackbone(module, spec, extra | options)


def usual_images(name: str) -> Preprocessing:
    """The images that the weights of a timm model take, without making the model.

    Raises:
        PipelineError: timm is missing, or has no such model.
    """
    known = _timm(name).get_pretrained_cfg(name)
    if known is None:  # timm has no weights of it
        return Preprocessing()
    return Preprocessing(int(known.input_size[-1]), tuple(known.mean), tuple(known.std))


def check_sizes(backbone: ForeignBackbone, channels: int, sizes: Sequence[int]) -> None:
    """Try one image of each size.

    Raises:
        PipelineError: the encoder does not take a size.
    """
    device, was = next(backbone.parameters()).device, backbone.training
    backbone.eval()
    for size in sizes:
        try:
            with torch.no_grad():
                backbone(torch.zeros(1, channels, size, size, device=device))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise PipelineError(
                f"the encoder does not take images of {size} x {size} pixels and {channels} "
                f"channels: {reason}",
                "choose an encoder for variable sizes, or one crop size that it takes "
                "(augment.local_crops=0)",
            ) from error
    backbone.train(was)


def _timm(name: str) -> Any:
    """The package, where it is there and has the model."""
    try:
        import timm
    except ImportError as error:
        raise PipelineError(f"timm:{name} needs the package timm", "pip install timm") from error
    if "local-dir:" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise PipelineError(
            f"timm {timm.__version__} has no model {name!r}",
            f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them",
        )
    return timm


def _create(spec: TimmSpec) -> tuple[Any, dict[str, Any]]:
    timm = _timm(spec.name)
    dropped: dict[str, Any] = {"drop_path_rate": spec.drop_path} if spec.drop_path else {}
    fixed: dict[str, Any] = {"num_classes": 0, "in_chans": spec.in_channels}
    # Only some families take these; the signature does not tell, because of **kwargs.
    sized: dict[str, Any] = {"img_size": spec.image_size, "dynamic_img_size": True}
    for extra in (sized, {"img_size": spec.image_size}, {}):
        try:
            model = timm.create_model(spec.name, pretrained=False, **fixed, **extra, **dropped)
            return model, fixed | extra
        except TypeError as error:
            last = error
    raise PipelineError(
        f"timm:{spec.name} could not be built: {last}", "choose another model or model.drop_path=0"
    ) from last


def _is_dense(module: nn.Module) -> bool:
    """Whether this is a convolution over overlapping windows and all channels."""
    if not isinstance(module, nn.Conv2d):
        return False
    return module.groups == 1 and module.kernel_size[0] > module.stride[0]


@contextmanager
def _keyed(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Foreign dropout draws from torch's global generator: seed it from ours, and put it back."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
