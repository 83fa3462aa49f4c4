"""Student and teacher: two encoders of one shape, the second the moving average of the first. When
distilling, a third network, which does not move, makes the targets: an encoder with heads, or any
network by its features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.model.encoders.frozen import Adapter, FeatureTeacher
from pipeline.model.encoders.module import ModuleSpec
from pipeline.model.foreign import NO_IBOT, NOT_HIDDEN, ForeignBackbone, TimmSpec
from pipeline.model.head import Head, Norm, Norms
from pipeline.model.vit import BackboneSpec, VisionTransformer

Backbone = VisionTransformer | ForeignBackbone
Spec = BackboneSpec | TimmSpec | ModuleSpec  # what a backbone is built from


@dataclass(frozen=True)
class HeadSpec:
    """What a head is made of. Defaults: DINOv2 short recipe."""

    prototypes: int = 65536
    bottleneck: int = 256
    hidden: int = 2048
    layers: int = 3
    float32: bool = False  # logits are float32 under autocast too
    norm: Norm = "none"  # after each hidden layer
    input_norm: Norm = "none"  # on the feature

    def build(self, width: int) -> Head:
        """A freshly initialised head for tokens of `width`, drawn from torch's global generator."""
        return Head(
            width,
            self.prototypes,
            self.bottleneck,
            self.hidden,
            self.layers,
            self.float32,
            Norms(self.norm, self.input_norm),
        )


class Encoded(NamedTuple):
    """What one forward gives to the losses. V views, K prototypes, M masked patches."""

    cls: Tensor  # [V, D] normed CLS tokens of the global views, before the head
    # [rows, K] logits: global CLS, local CLS, and with a shared head the masked patches after them;
    # [0, 0] without heads.
    dino: Tensor
    ibot: Tensor | None  # [M, K'] logits of the masked patches from a head of their own
    # What the student's adapter makes of global views: [V, D] and [V * P, D]
    adapted_cls: Tensor | None = None
    adapted_patches: Tensor | None = None


class Encoder(nn.Module):
    """Backbone, heads and adapter under one forward, so that DDP sees one call a micro batch."""

    def __init__(
        self,
        backbone: Backbone,
        dino_head: Head | None,
        ibot_head: Head | None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        self.adapter = adapter

    def forward(
        self,
        global_views: Tensor,
        local_views: Tensor | None = None,
        masks: Tensor | None = None,
        masked: Tensor | None = None,
        score_cls: bool = True,
        generator: torch.Generator | None = None,
        rows: int | None = None,
    ) -> Encoded:
        """Score CLS tokens and masked patches against the prototypes. In training mode an adapter
        is asked too: for all tokens of global views, hidden patches included.

        Args:
            global_views: `[V, C, S, S]`.
            local_views: `[W, C, s, s]`, or None.
            masks: bool `[V, P]`, patches hidden from the backbone; None (the teacher) hides none.
            masked: int64 `[M]`, flat places in `[V * P]` whose patch tokens are scored; None: none.
            score_cls: False leaves the CLS tokens out of the head (a DINO weight of 0).
            generator: source of stochastic depth, used in training mode only.
            rows: how many of `masked` count, the first, where BatchNorm looks; None: all.

        Raises:
            PipelineError: patches are scored that the backbone cannot hide.
        """
        if masked is None:
            masked = torch.zeros(0, dtype=torch.long, device=global_views.device)
        places = len(masked)
        if places and not self.backbone.takes_masks:
            raise PipelineError(NOT_HIDDEN, NO_IBOT)
        adapter = self.adapter if self.training else None
        if adapter is not None and adapter.patch is not None:
            height, width = self.grid(global_views)
            every = torch.arange(len(global_views) * height * width, device=masked.device)
            masked = torch.cat([masked, every])
        inputs, hidden = [global_views], [masks]
        if local_views is not None and len(local_views):
            inputs.append(local_views)
            hidden.append(None)
        chosen = self.backbone.encode(inputs, hidden, masked, generator)
        count = len(chosen) - len(masked)
        cls, patch = chosen[:count], chosen[count : count + places]
        views = len(global_views)
        adapted: tuple[Tensor | None, Tensor | None] = (None, None)
        if adapter is not None:  # by its own forward, for which FSDP waits
            adapted = adapter(cls[:views], chosen[count + places :])
        if self.dino_head is None:
            return Encoded(cls[:views], cls.new_zeros(0, 0), None, *adapted)
        scored = cls if score_cls else cls[:0]
        if self.ibot_head is not None:
            ibot = self.ibot_head(patch, rows)
            return Encoded(cls[:views], self.dino_head(scored), ibot, *adapted)
        together = chosen[: count + places] if score_cls else patch
        filling = places - rows if rows is not None else 0
        dino = self.dino_head(together, len(together) - filling)
        return Encoded(cls[:views], dino, None, *adapted)

    def grid(self, views: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of views `[V, C, H, W]`."""
        rows, columns = (side // self.backbone.patch_size for side in views.shape[-2:])
        return rows, columns


@dataclass
class Pair:
    """The encoders of a run. Teacher and frozen one hold no gradients."""

    student: Encoder
    teacher: Encoder  # the moving average of the student
    frozen: Encoder | None = None  # makes the targets instead of the teacher, when distilling
    feature_teacher: FeatureTeacher | None = None  # whose features are learnt, when distilling

    def __iter__(self) -> Iterator[Encoder]:
        """`student, teacher = pair`."""
        return iter((self.student, self.teacher))

    @property
    def target_maker(self) -> Encoder:
        """The encoder whose answers the student is asked to predict."""
        return self.frozen or self.teacher

    def to(self, device: torch.device | str) -> Pair:
        """Move all, in place."""
        for network in (self.student, self.teacher, self.frozen, self.feature_teacher):
            if network is not None:
                network.to(device)
        return self


def build_pair(
    backbone: Spec | Backbone, dino: HeadSpec | None, ibot: HeadSpec | None, seed: int
) -> Pair:
    """Student from `seed`, teacher as its copy. `ibot=None` shares the DINO head, `dino=None` makes
    no heads. Leaves the global generator alone. A backbone that exists already is used as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = backbone.build() if isinstance(backbone, Spec) else backbone
        student = Encoder(
            network,
            dino.build(network.width) if dino is not None else None,
            ibot.build(network.width) if ibot is not None else None,
        )
    return pair_of(student)


def pair_of(student: Encoder) -> Pair:
    """A student with a teacher that is its copy.

    The teacher is in eval mode, but for BatchNorm: its layers normalise with the batch, as in DINO,
    because averaged weights do not fit anybody's running means. The running means that they keep
    meanwhile are for evaluation. Each worker normalises with its own micro batches, whose size does
    not change with the number of workers; the running means that are kept are worker 0's.
    """
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return Pair(student.train(), teacher)


def freeze(encoder: Encoder, student: Encoder) -> Encoder:
    """A trained encoder as the frozen teacher of a student.

    Raises:
        PipelineError: with everything in which their targets do not fit each other.
    """
    problems = []
    for name, head, other in (
        ("head", encoder.dino_head, student.dino_head),
        ("ibot_head", encoder.ibot_head, student.ibot_head),
    ):
        theirs, ours = (len(h.last_layer.weight_g) if h else 0 for h in (head, other))
        if theirs != ours:
            problems.append(
                f"its {name} has {theirs or 'no'} prototypes, the student's {ours or 'no'}"
            )
    sizes = (encoder.backbone.patch_size, student.backbone.patch_size)
    if sizes[0] != sizes[1]:
        problems.append(f"its patches have {sizes[0]} pixels, the student's {sizes[1]}")
    if problems:
        raise PipelineError(
            f"the frozen teacher does not fit: {'; '.join(problems)}",
            "set head.prototypes, ibot_head and model.patch_size as they were for the teacher",
        )
    return encoder.requires_grad_(False).eval()


@torch.no_grad()
def ema_update(pair: Pair, momentum: float) -> None:
    """`teacher = momentum * teacher + (1 - momentum) * student`, for every parameter that learns.
    One that is frozen in the student is equal in the teacher, if not the same tensor.
    """
    both = zip(pair.student.parameters(), pair.teacher.parameters(), strict=True)
    learnt = [(ours, theirs) for ours, theirs in both if ours.requires_grad]
    student, teacher = (local_parts([each[i] for each in learnt]) for i in (0, 1))
    move(student, teacher, momentum)


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this worker holds of each tensor, as plain tensors of the same memory: its slice where
    tensors are split over workers, else all of it.
    """
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


@torch.no_grad()
def move(student: list[Tensor], teacher: list[Tensor], momentum: float) -> None:
    """Moves the teacher's tensors towards the student's, in place, pair by pair."""
    torch._foreach_lerp_(teacher, student, 1 - momentum)
