"""Any module as a backbone: one from Python, or one that a factory named in a recipe makes.

B views, N tokens, P patches, D width, S side in pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError, one_line, shortened
from pipeline.model.encoders.made import make_module
from pipeline.model.encoders.source import Name, digest_of
from pipeline.model.foreign import Features, ForeignBackbone

KEYWORDS = ("image_size", "patch_size", "in_channels", "drop_path")  # a factory gets those it takes
PROBED = 2  # images that tell the shape of the output


class ModuleBackbone(ForeignBackbone):
    """Any module from Python that returns `[B, D]`, or tokens `[B, N, D]` with CLS first.

    Tokens of a module whose forward takes `masks` (bool `[B, P]`) can be trained with iBOT; it
    must hide these patches itself.
    """

    def __init__(
        self, module: nn.Module, width: int, patch_size: int = 1, prefix_tokens: int = 1
    ) -> None:
        """Wrap a module.

        Args:
            module: `[B, C, H, W]` to `[B, D]` or `[B, prefix_tokens + P, D]`.
            width: D.
            patch_size: side of a patch in pixels, where there are tokens.
            prefix_tokens: CLS and registers before the patches.
        """
        takes_masks = "masks" in inspect.signature(module.forward).parameters
        super().__init__(module, width, patch_size, has_patches=takes_masks)
        self.prefix_tokens = prefix_tokens
        self.spec: ModuleSpec | None = None  # of the factory that made it, if one did

    def features(self, x: Tensor, masks: Tensor | None) -> Features:
        """See `ForeignBackbone`.

        Raises:
            PipelineError: the module's output has another shape.
        """
        out = self.module(x, masks=masks) if self.takes_masks else self.module(x)
        shape = tuple(getattr(out, "shape", ()))
        count = x.shape[0]  # not `len`, which fixes the number of images of an export
        if len(shape) not in (2, 3) or shape[0] != count or shape[-1] != self.width:
            raise PipelineError(
                f"the encoder returned {shape or type(out).__name__} for {tuple(x.shape)}, "
                f"expected [{count}, {self.width}] or [{count}, tokens, {self.width}]",
                "give the module's width, or wrap it so that it returns features or tokens",
            )
        if len(shape) == 2:
            return out, None
        return out[:, 0], out[:, self.prefix_tokens :]


@dataclass(frozen=True)
class ModuleSpec:
    """What `model.encoder=module:<package.module>:<factory>` says, with the text of the module."""

    name: str  # package.module:factory
    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    drop_path: float = 0.0
    files: Mapping[str, str] = field(default_factory=dict)  # text by the name of the file

    @property
    def digest(self) -> str:
        """Of the text."""
        return digest_of(self.files)

    def taken(self) -> dict[str, Any]:
        """The keywords that the factory gets: those of `KEYWORDS` that it takes.

        Raises:
            PipelineError: as `factory`, or it wants others.
        """
        factory = self.factory()
        try:
            parameters = inspect.signature(factory).parameters
        except (TypeError, ValueError):  # written in C
            return {}
        every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
        missing = [
            name
            for name, p in parameters.items()
            if p.default is p.empty
            and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            and (name not in KEYWORDS or name in positional)
        ]
        if missing:
            raise PipelineError(
                f"model.encoder=module:{self.name} wants {', '.join(missing)}, and a factory gets "
                f"{', '.join(KEYWORDS)} alone, those of them that it takes",
                "give these a default, or write a factory that sets them",
            )
        return {
            keyword: getattr(self, keyword)
            for keyword in KEYWORDS
            if every or (keyword in parameters and keyword not in positional)
        }

    def factory(self) -> Any:
        """The function or class that makes the encoder.

        Raises:
            PipelineError: the module is no Python or cannot be imported, or has no such function.
        """
        name = Name.of(self.name)
        module = make_module(name, self.files)
        factory = getattr(module, name.factory, None)
        if not callable(factory):
            others = [
                each
                for each, value in vars(module).items()
                if inspect.isfunction(value) and value.__module__ == module.__name__
                if not each.startswith("_")
            ]
            raise PipelineError(
                f"model.encoder={name}: {name.module} has no function {name.factory}",
                f"it has {', '.join(others[:8])}" if others else "write it, or name another one",
            )
        return factory

    def build(self) -> ModuleBackbone:
        """The encoder, drawn from torch's global generator.

        Raises:
            PipelineError: whatever is wrong with the module, its factory or what it gives.
        """
        factory, keywords = self.factory(), self.taken()
        try:
            module = factory(**keywords)
        except Exception as error:
            shown = ", ".join(f"{name}={value}" for name, value in keywords.items())
            raise PipelineError(
                f"model.encoder=module:{self.name} failed with {shown or 'no arguments'}: "
                f"{_said(error)}",
                "mend the factory, or change the fields that it gets",
            ) from error
        if not isinstance(module, nn.Module):
            raise PipelineError(
                f"model.encoder=module:{self.name} returned {type(module).__name__}, expected an "
                "nn.Module",
                "return the network itself",
            )
        width, tokens = self._output(module)
        backbone = ModuleBackbone(module, width, self.patch_size)
        backbone.has_patches, backbone.spec = tokens, self
        return backbone

    def _output(self, module: nn.Module) -> tuple[int, bool]:
        """D of an output of the right shape, and whether it is tokens.

        Raises:
            PipelineError: the module takes no images of the recipe, or gives another shape.
        """
        size, side = self.image_size, self.image_size // self.patch_size
        shown = [PROBED, self.in_channels, size, size]
        was = module.training
        try:
            with torch.no_grad():
                out = module.eval()(torch.zeros(shown))
        except Exception as error:
            raise PipelineError(
                f"model.encoder=module:{self.name} fails on images {shown}: {_said(error)}",
                "its forward must take images [B, C, S, S] of augment.global_size and "
                "model.in_channels",
            ) from error
        module.train(was)
        tokens, shape = 1 + side * side, list(getattr(out, "shape", ()))
        right = isinstance(out, Tensor) and out.is_floating_point() and shape[:1] == [PROBED]
        if right and (len(shape) == 2 or (len(shape) == 3 and shape[1] == tokens)):
            return int(shape[-1]), len(shape) == 3
        got = shape if isinstance(out, Tensor) else type(out).__name__
        raise PipelineError(
            f"model.encoder=module:{self.name} returned {got} for images {shown}, expected "
            f"features [{PROBED}, D] or tokens [{PROBED}, {tokens}, D]: CLS, then {side} x {side} "
            f"patches of {self.patch_size} pixels",
            "return one of these; model.patch_size is the side of a patch",
        )


def _said(error: Exception) -> str:
    if isinstance(error, PipelineError):
        return error.what
    return f"{type(error).__name__}: {shortened(one_line(error))}"
