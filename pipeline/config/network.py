"""The backbone and its heads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.section import NonNegative, Positive, Section
from pipeline.config.sizes import SIZES


class Model(Section):
    """The backbone (DINOv2 paper, table 17)."""

    encoder: str = Field(
        "dinov2",
        pattern=r"^(dinov2|timm:.+|module:[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
        description="dinov2: the ViT of these fields; timm:<model>, or module:<package.module>:"
        "<factory>, which take of them patch_size, in_channels, drop_path",
    )
    init: str = Field(
        "",
        description="weights to start from: dinov2 .pth, Hugging Face or timm folder, safetensors, "
        "or a run folder of ours (then with its heads)",
    )
    init_resize: bool = Field(
        False, description="resize the position embeddings of init to this run's image size"
    )
    size: Literal["vits", "vitb", "vitl", "vitg"] = Field("vits", description="backbone size")
    width: Positive | None = Field(None, description="overrides the size's width")
    depth: Positive | None = Field(None, description="overrides the size's number of blocks")
    heads: Positive | None = Field(None, description="overrides the size's attention heads")
    patch_size: Positive = Field(14, description="side of a patch, pixels")
    in_channels: Positive = Field(3, description="channels of an image; 3 is RGB")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP over the width")
    ffn: Literal["mlp", "swiglu"] = Field("mlp", description="feed-forward; swiglu in the L and g")
    registers: int = Field(4, ge=0, description="register tokens; 0 in the paper's training runs")
    layer_scale: float = Field(1e-5, gt=0, description="initial LayerScale")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth; .3 short, .4 long")
    interpolate_offset: NonNegative = Field(
        0.0, description="added to the grid when position embeddings are resized; official: .1"
    )
    interpolate_antialias: bool = Field(
        True, description="antialias resized position embeddings; official training: false"
    )

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """Width, depth, heads with the overrides applied."""
        width, depth, heads = SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads

    @model_validator(mode="after")
    def _divides(self) -> Model:
        width, _, heads = self.dimensions
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        return self


class Head(Section):
    """The DINO head: MLP, bottleneck, weight-normed prototypes."""

    prototypes: Positive = Field(65536, description="prototypes K; 131072 in the long recipe")
    bottleneck: Positive = Field(
        256, description="width before the prototypes; 384 in the long one"
    )
    hidden: Positive = Field(2048, description="hidden width of the head's MLP")
    layers: int = Field(3, ge=1, le=8, description="linear layers of the head's MLP")
    norm: Literal["none", "batch"] = Field(
        "none", description="batch: BatchNorm after each hidden layer of the head"
    )
    input_norm: Literal["none", "batch"] = Field(
        "none", description="batch: BatchNorm on the feature that the head gets, without weights"
    )

    @model_validator(mode="after")
    def _hidden_layers(self) -> Head:
        if self.norm == "batch" and self.layers == 1:
            raise ValueError(
                "norm=batch puts BatchNorm after each hidden layer, and a head of layers=1 has "
                "none; set layers=2 or more, or input_norm=batch"
            )
        return self


class IbotHead(Head):
    """iBOT's head; shared with DINO unless `separate`."""

    separate: bool = Field(False, description="a head of its own for iBOT; long recipe: true")
