"""What is optimised: the weighted sum of DINO, iBOT and KoLeo, and the state the teacher's targets
need.

B images, V = G * B global views, L local crops, M masked patches, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.loss.dino import GLOBAL, LOCAL, dino_predictions
from pipeline.loss.ibot import ibot_predictions, patch_weights
from pipeline.loss.koleo import koleo
from pipeline.loss.prototypes import STUDENT_TEMPERATURE, Prediction, cross_entropy
from pipeline.loss.target import Centre, Target, sinkhorn_targets, softmax_targets
from pipeline.model.pair import Encoded, Pair
from pipeline.views.batch import Views
from pipeline.views.masked import Masked

PATCH = 2  # place of the iBOT term beside GLOBAL and LOCAL
PATCH_STEPS = 32  # numbers of rows that masked patches are filled up to, of those of all patches


@dataclass(frozen=True)
class ObjectiveSpec:
    """Weights and constants of the loss. Defaults: DINOv2 short recipe; the long one centres with
    sinkhorn.
    """

    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temperature: float = STUDENT_TEMPERATURE
    centring: Literal["softmax", "sinkhorn"] = "softmax"
    centre_momentum: float = 0.9
    sinkhorn_iterations: int = 3
    distil: bool = False  # no masks: iBOT on every patch of the global views
    clip: float = 3.0  # gradient norm limit of each of backbone, dino_head, ibot_head


class Targets(NamedTuple):
    """The teacher's answers for one micro batch; None where the term has weight 0."""

    dino: Target | None  # V rows
    ibot: Target | None  # M rows


class Terms(NamedTuple):
    """The loss of one micro batch: `total` is optimised, `parts` are the unweighted terms, `health`
    is for the log.
    """

    total: Tensor
    parts: dict[str, Tensor]
    health: dict[str, Tensor]


class Objective:
    """Makes targets and losses, and holds the two centres, which `commit` moves."""

    def __init__(self, spec: ObjectiveSpec, dino_prototypes: int, ibot_prototypes: int) -> None:
        """Start with centres at 0.

        Raises:
            PipelineError: unknown centring, a negative weight, or no term at all.
        """
        weights = (spec.dino_weight, spec.ibot_weight, spec.koleo_weight)
        if spec.centring not in ("softmax", "sinkhorn"):
            raise PipelineError(f"unknown centring {spec.centring!r}", "use softmax or sinkhorn")
        if min(weights) < 0 or max(weights) == 0:
            raise PipelineError(
                f"loss weights dino, ibot, koleo are {weights}",
                "use weights >= 0, at least one > 0",
            )
        self.spec = spec
        self.dino_centre = Centre(dino_prototypes, spec.centre_momentum)
        self.ibot_centre = Centre(ibot_prototypes, spec.centre_momentum)
        # of each micro batch of this step, `[1, K]`; without rows `[0, K]`
        self._cls_means: list[Tensor] = []
        self._patch_means: list[Tensor] = []

    @classmethod
    def for_pair(cls, spec: ObjectiveSpec, pair: Pair) -> Objective:
        """An objective with the numbers of prototypes of a pair's heads."""
        dino = pair.teacher.dino_head
        ibot = pair.teacher.ibot_head or dino
        return cls(spec, len(dino.last_layer.weight_g), len(ibot.last_layer.weight_g))

    @property
    def scores_cls(self) -> bool:
        """Whether CLS tokens go through the head."""
        return self.spec.dino_weight > 0

    def masked(self, views: Views) -> Masked:
        """The patches that iBOT scores: the masked ones, all when distilling, none where iBOT has
        weight 0.

        Raises:
            PipelineError: iBOT has a weight, and the views have no masks.
        """
        if not views.masks.shape[1]:
            if self.spec.ibot_weight:
                raise PipelineError(
                    f"the views have no masks, and iBOT has weight {self.spec.ibot_weight}",
                    "give the views masks (masks_for), or ObjectiveSpec(ibot_weight=0)",
                )
            return Masked(torch.zeros(0, dtype=torch.long, device=views.masks.device), 0)
        flat = self._scored(views).flatten()
        patches = len(flat)
        if self.spec.ibot_weight == 0:
            flat = flat[:0]
        places = flat.nonzero().squeeze(1)
        step = -(-patches // PATCH_STEPS)
        length = min(patches, -(-len(places) // step) * step)
        return Masked(F.pad(places, (0, length - len(places))), len(places))

    def hidden(self, views: Views) -> Tensor | None:
        """Bool `[V, P]`, the patches hidden from the student: none when distilling, None where
        the views have no masks.
        """
        if not views.masks.shape[1]:
            return None
        return torch.zeros_like(views.masks) if self.spec.distil else views.masks

    def _scored(self, views: Views) -> Tensor:
        return torch.ones_like(views.masks) if self.spec.distil else views.masks

    def targets(
        self, teacher: Iterator[tuple[Encoded, int]], temperature: float
    ) -> Iterator[Targets]:
        """Targets of a step's micro batches, in order, from the teacher's unmasked global views and
        the number of masked patches among their rows.

        With softmax centring the teacher is asked for one micro batch at a time, so that no more
        logits are held at once. Sinkhorn balances all micro batches together and must hold them
        all. Every worker must take them all and then, if the step counts, call `commit`: both sum
        over the workers.
        """
        self._cls_means, self._patch_means = [], []
        if self.spec.centring == "sinkhorn":
            return self._balanced(teacher, temperature)
        return self._centred(teacher, temperature)

    def commit(self) -> None:
        """Gives the centres the means of this step's logits. A step that was not finite must not
        call it: its logits would stay in the centres.
        """
        if self.spec.centring == "sinkhorn":
            return  # balances without centres
        if self.scores_cls:
            self.dino_centre.see(self._cls_means)
        if self.spec.ibot_weight > 0:
            self.ibot_centre.see(self._patch_means)
        self._cls_means, self._patch_means = [], []

    def _centred(
        self, teacher: Iterator[tuple[Encoded, int]], temperature: float
    ) -> Iterator[Targets]:
        while (encoded := next(teacher, None)) is not None:
            cls, patch = self._split(*encoded)
            del encoded
            dino = ibot = None
            if self.scores_cls:
                dino = _softmax(cls, self.dino_centre, temperature, self._cls_means)
            if self.spec.ibot_weight > 0:
                ibot = _softmax(patch, self.ibot_centre, temperature, self._patch_means)
            targets = [Targets(dino, ibot)]
            del cls, patch, dino, ibot
            yield targets.pop()  # held by nobody here while it is used

    def _balanced(
        self, teacher: Iterator[tuple[Encoded, int]], temperature: float
    ) -> Iterator[Targets]:
        both = [self._split(encoded, masked) for encoded, masked in teacher]
        cls, patch = [each[0] for each in both], [each[1] for each in both]
        rounds = self.spec.sinkhorn_iterations
        nothing: list[Target | None] = [None] * len(both)
        del both
        dino: Sequence[Target | None] = (
            sinkhorn_targets(cls, temperature, rounds) if self.scores_cls else nothing
        )
        ibot: Sequence[Target | None] = (
            sinkhorn_targets(patch, temperature, rounds) if self.spec.ibot_weight > 0 else nothing
        )
        del cls, patch
        left = list(zip(dino, ibot, strict=True))
        del dino, ibot
        while left:  # a micro batch's logits are freed when its turn is over
            yield Targets(*left.pop(0))

    def _split(self, encoded: Encoded, masked: int) -> tuple[Tensor, Tensor]:
        """The teacher's logits of CLS tokens and masked patches, whichever head they are from."""
        if encoded.ibot is not None:
            return encoded.dino, encoded.ibot[:masked]
        rows = len(encoded.cls) if self.scores_cls else 0
        return encoded.dino[:rows], encoded.dino[rows : rows + masked]

    def losses(self, student: Encoded, targets: Targets, views: Views, masked: Masked) -> Terms:
        """The terms of one micro batch, in fp32."""
        spec = self.spec
        global_rows = len(views.global_views)
        cls_rows = global_rows + len(views.local_views) if self.scores_cls else 0

        def dino() -> Iterator[Prediction]:
            if targets.dino is not None:
                yield from dino_predictions(targets.dino, views.local_crops, views.global_crops)

        def ibot(first_row: int) -> Iterator[Prediction]:
            if targets.ibot is not None:
                weights = patch_weights(self._scored(views), masked.places[: masked.rows])
                yield from ibot_predictions(targets.ibot, weights, first_row, PATCH)

        if student.ibot is None:
            sums = cross_entropy(
                student.dino, lambda: chain(dino(), ibot(cls_rows)), 3, spec.student_temperature
            )
        else:  # a head without rows stays in the graph: DDP waits for its gradients
            sums = cross_entropy(student.dino, dino, 3, spec.student_temperature) + cross_entropy(
                student.ibot, lambda: ibot(0), 3, spec.student_temperature
            )
        total = spec.dino_weight * (sums[GLOBAL] + sums[LOCAL]) + spec.ibot_weight * sums[PATCH]
        parts: dict[str, Tensor] = {}
        if spec.dino_weight > 0:
            parts |= {"dino_global": sums[GLOBAL].detach(), "dino_local": sums[LOCAL].detach()}
        if spec.ibot_weight > 0:
            parts["ibot"] = sums[PATCH].detach()
        if spec.koleo_weight > 0:
            # Each global crop by itself: two crops of one image are meant to be neighbours.
            spread = torch.stack([koleo(x) for x in student.cls.chunk(views.global_crops)]).sum()
            total = total + spec.koleo_weight * spread
            parts["koleo"] = spread.detach()
        health: dict[str, Tensor] = {}
        if targets.dino is not None:
            with torch.no_grad():
                entropy = targets.dino.entropy()
                others = views.global_crops - 1
                # the mean over the pairs of two global views
                cross = parts["dino_global"] * (others + views.local_crops) / others
                health = {
                    "teacher_entropy": entropy,
                    "student_teacher_kl": cross - entropy,
                    "prototypes_used": targets.dino.prototypes_used(),
                }
        return Terms(total, {"total": total.detach(), **parts}, health)

    def state_dict(self) -> dict[str, Any]:
        """Both centres with their pending means: nested dicts of tensors."""
        return {"dino": self.dino_centre.state_dict(), "ibot": self.ibot_centre.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            PipelineError: the centres have another number of prototypes.
        """
        for name, centre in (("dino", self.dino_centre), ("ibot", self.ibot_centre)):
            saved, expected = state[name]["value"].numel(), centre.value.numel()
            if saved != expected:
                raise PipelineError(
                    f"the checkpoint's {name} centre has {saved} prototypes, "
                    f"the head has {expected}",
                    "set the head's prototypes as in the checkpoint",
                )
            centre.load_state_dict(state[name])


def _softmax(logits: Tensor, centre: Centre, temperature: float, means: list[Tensor]) -> Target:
    """Centred targets of one micro batch; its mean, where it has rows, is added to `means`."""
    means.append(logits.mean(dim=0, keepdim=True, dtype=torch.float32) if len(logits) else logits)
    return softmax_targets([logits], centre.use().to(logits.device), temperature)[0]
