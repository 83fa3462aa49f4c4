"""What is fine-tuned: a backbone and a linear head on its features.

The head of a ViT of ours takes CLS and the mean of the patches side by side, which is what the
`ForImageClassification` models of transformers compute for DINOv2, with and without registers. The
head of a timm model takes what timm's own classifier takes: CLS or pooled features; that of an
encoder of one's own takes its feature.

Shapes: B images, C channels, S side in pixels, D width, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.finetune.settings import Settings
from pipeline.model.encoders.module import ModuleBackbone
from pipeline.model.fit import Facts
from pipeline.model.foreign import TimmBackbone, timm_by_name
from pipeline.model.low_rank import add_low_rank
from pipeline.model.vit import BackboneSpec, VisionTransformer

Tunable = VisionTransformer | TimmBackbone | ModuleBackbone
# LayerScale at the start by depth, where it is drawn anew (Touvron et al. 2021, CaiT, section 2).
LAYER_SCALE = ((18, 0.1), (24, 1e-5), (10**6, 1e-6))


class Classifier(nn.Module):
    """A backbone and its head."""

    def __init__(self, backbone: Tunable, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.width * (2 if isinstance(backbone, VisionTransformer) else 1)
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What the head sees of images `[B, C, S, S]`: `[B, 2 D]`, of timm models `[B, D]`.

        Args:
            x: normalised.
            generator: source of stochastic depth, used in training mode only.
        """
        if not isinstance(self.backbone, VisionTransformer):
            features: Tensor = self.backbone(x)
            return features
        outputs = self.backbone.forward_features(x, generator=generator)
        cls, patches = outputs["x_norm_clstoken"], outputs["x_norm_patchtokens"]
        assert cls is not None and patches is not None  # of a ViT of ours, always
        return torch.cat([cls, patches.mean(1)], 1)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits `[B, K]` of images `[B, C, S, S]`."""
        logits: Tensor = self.head(self.features(x, generator))
        return logits

    def learning(self, on: bool) -> None:
        """Training or evaluation mode: a backbone that does not learn as a whole stays in that of
        evaluation, without stochastic depth and with the statistics of its norms.
        """
        self.train(on)
        if on and not all(p.requires_grad for p in trunk(self.backbone)):
            self.backbone.eval()


def trunk(backbone: nn.Module) -> list[nn.Parameter]:
    """The backbone's parameters but for the mask token, which no classifier uses."""
    return [p for name, p in backbone.named_parameters() if name != "mask_token"]


def classifier_of(backbone: nn.Module, classes: int, settings: Settings) -> Classifier:
    """The network as training begins with it: all that is drawn is drawn from the seed.

    Args:
        backbone: as it was loaded; taken over.
        classes: K.
        settings: of the fine-tuning.

    Raises:
        PipelineError: the backbone is of another kind, or does not fit the settings.
    """
    if not isinstance(backbone, Tunable):
        raise PipelineError(
            f"{settings.model} cannot be fine-tuned: it is a {type(backbone).__name__}",
            "give a run, weights in one of the three formats, or timm:<name>",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.from_scratch:
            backbone = drawn_anew(backbone)
        backbone = at_size(backbone, settings.image_size)
        classifier = Classifier(backbone, classes)
        nn.init.trunc_normal_(classifier.head.weight, std=0.01)  # logits near 0: all alike at first
        nn.init.zeros_(classifier.head.bias)
    backbone.requires_grad_(settings.tune == "all")
    if hasattr(backbone, "mask_token"):
        backbone.mask_token.requires_grad_(False)
    if settings.tune == "low_rank":
        field = f"finetune.rank={settings.rank}"
        add_low_rank(backbone, settings.rank, settings.seed, field, attention_only=True)
    if isinstance(backbone, VisionTransformer):
        backbone.drop_path = settings.drop_path if settings.tune == "all" else 0.0
    elif settings.drop_path:
        raise PipelineError(
            f"finetune.drop_path={settings.drop_path:g} is for our own ViT, {settings.model} is "
            "none",
            "set finetune.drop_path=0",
        )
    return classifier


def spec_of(backbone: VisionTransformer) -> BackboneSpec:
    """What a backbone is made of, read off its weights; LayerScale as it would begin."""
    facts = Facts.of(backbone.state_dict())
    depth = facts.depth
    return BackboneSpec(
        image_size=math.isqrt(facts.patches) * facts.patch_size,
        patch_size=facts.patch_size,
        width=facts.width,
        depth=depth,
        heads=backbone.blocks[0].attn.heads,  # type: ignore[union-attr, arg-type]
        mlp_ratio=facts.mlp_ratio,
        ffn=facts.ffn,
        registers=facts.registers,
        layer_scale=next(scale for most, scale in LAYER_SCALE if depth <= most),
        in_channels=facts.in_channels,
        interpolate_offset=backbone.interpolate_offset,
        interpolate_antialias=backbone.interpolate_antialias,
    )


def drawn_anew(backbone: Tunable) -> Tunable:
    """The same architecture with fresh weights, from torch's global generator."""
    if isinstance(backbone, VisionTransformer):
        return spec_of(backbone).build()
    if isinstance(backbone, ModuleBackbone):
        assert backbone.spec is not None  # of a run or its weights, always
        return backbone.spec.build()
    return timm_by_name(backbone.spec.name, backbone.arguments)


@torch.no_grad()
def at_size(backbone: Tunable, image_size: int) -> Tunable:
    """The backbone with position embeddings of images of this size.

    Resized once, by the model's own rule: so they are learnt at this size, and other libraries,
    which resize by other rules, need not resize what is exported.

    Raises:
        PipelineError: the size is no multiple of the patches.
    """
    if not isinstance(backbone, VisionTransformer):
        return backbone
    spec = spec_of(backbone)
    if image_size % spec.patch_size:
        nearest = max(1, round(image_size / spec.patch_size)) * spec.patch_size
        raise PipelineError(
            f"finetune.image_size={image_size} is not a multiple of the patch size "
            f"{spec.patch_size}",
            f"set finetune.image_size={nearest}",
        )
    if image_size != spec.image_size:
        position = backbone.position(image_size, image_size).to(backbone.pos_embed.dtype)
        backbone.pos_embed = nn.Parameter(position.clone())
    return backbone


def described(classifier: Classifier) -> str:
    """How many weights there are, and how many of them learn."""
    parameters = list(classifier.parameters())
    learnt = sum(p.numel() for p in parameters if p.requires_grad)
    every = sum(p.numel() for p in parameters)
    return f"{learnt:,} of {every:,} weights learn"
