"""What is done to the blocks of a backbone one by one: compiled, or computed again in the backward
pass; and the type of the tokens between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.model.foreign import ForeignBackbone
from pipeline.model.pair import Backbone
from pipeline.model.vit import VisionTransformer

# Of one kind of block, before dynamo leaves the rest as it is. Ours need one. timm's have each a
# rate of stochastic depth in theirs: three for each block, of both sizes of crops and the teacher.
GRAPHS = 128


def of(backbone: Backbone) -> Sequence[nn.Module]:
    """The blocks of a backbone, in order; none of one that is not a row of blocks."""
    network = backbone.module if isinstance(backbone, ForeignBackbone) else backbone
    blocks = getattr(network, "blocks", ())
    return list(blocks) if isinstance(blocks, nn.ModuleList | nn.Sequential) else []


def compile_blocks(backbone: Backbone) -> None:
    """Compiles the blocks, whose shapes do not change from step to step, one by one.

    Dynamo would cut a block's graph into pieces as large as DDP's buckets, so that sums start
    earlier; between blocks they start early enough, and one graph is faster.
    """
    torch._dynamo.config.optimize_ddp = False
    for block in of(backbone):
        block.compile(dynamic=False, recompile_limit=GRAPHS)


def set_checkpointing(backbone: Backbone) -> None:
    """From now on the backward pass computes each block again from its input.

    Raises:
        PipelineError: a foreign backbone that cannot.
    """
    if isinstance(backbone, VisionTransformer):
        backbone.checkpointing = True
        return
    network: Any = backbone.module
    if not hasattr(network, "set_grad_checkpointing"):
        raise PipelineError(
            "train.activation_checkpointing=true: this encoder does not know how",
            "set train.activation_checkpointing=false, and a smaller micro batch by "
            "train.accumulation",
        )
    network.set_grad_checkpointing(True)


def set_residual(backbone: Backbone, dtype: torch.dtype) -> None:
    """The type of the tokens between two blocks, under autocast.

    Raises:
        PipelineError: another one than float32 for a foreign backbone.
    """
    if isinstance(backbone, VisionTransformer):
        backbone.residual = dtype
    elif dtype != torch.float32:
        raise PipelineError(
            f"train.residual={str(dtype).removeprefix('torch.')} is for model.encoder=dinov2, "
            "whose blocks we know",
            "set train.residual=float32",
        )
