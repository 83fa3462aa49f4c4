"""What is optimised: the weighted sum of DINO, iBOT, KoLeo and the features of another network, and
the state the teacher's targets need.

B images, V = G * B global views, L local crops, M masked patches, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.loss.centre import Centre
from pipeline.loss.dino import GLOBAL, LOCAL, dino_span
from pipeline.loss.form import Kernels
from pipeline.loss.ibot import patch_weights
from pipeline.loss.koleo import koleo
from pipeline.loss.prototypes import STUDENT_TEMPERATURE, Span, cross_entropy
from pipeline.loss.target import Target, sinkhorn_targets, softmax_targets
from pipeline.model.encoders.frozen import Features
from pipeline.model.pair import Encoded, Pair
from pipeline.train.distil.features import FeatureObjective, FeatureSpec, FeatureTargets
from pipeline.views.batch import Views
from pipeline.views.masked import Masked, masked_patches, scored_patches

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
    kernels: Kernels = "auto"  # what computes, see `pipeline.loss.form`
    clip: float = 3.0  # gradient norm limit of each of backbone, heads and adapter
    features: FeatureSpec | None = None  # of a teacher of features, where the pair has one


class Answer(NamedTuple):
    """What the teacher says of the global views of one micro batch, with nothing hidden."""

    encoded: Encoded | None  # None where no network has heads
    masked: int  # M, masked patches among its rows
    weights: Tensor | None = None  # `Views.weights`
    features: Features | None = None  # of the teacher of features, where there is one


class Targets(NamedTuple):
    """The teacher's answers for one micro batch; None where the term has weight 0."""

    dino: Target | None  # V rows
    ibot: Target | None  # M rows
    features: FeatureTargets | None = None


class Terms(NamedTuple):
    """The loss of one micro batch: `total` is optimised, `parts` are the unweighted terms, `health`
    is for the log.
    """

    total: Tensor
    parts: dict[str, Tensor]
    health: dict[str, Tensor]


class Objective:
    """Makes targets and losses, and holds the two centres, which `commit` moves."""

    def __init__(
        self,
        spec: ObjectiveSpec,
        dino_prototypes: int,
        ibot_prototypes: int,
        features: FeatureObjective | None = None,
    ) -> None:
        """Start with centres at 0.

        Raises:
            PipelineError: unknown centring, a negative weight, or no term at all.
        """
        weights = (spec.dino_weight, spec.ibot_weight, spec.koleo_weight)
        if spec.centring not in ("softmax", "sinkhorn"):
            raise PipelineError(f"unknown centring {spec.centring!r}", "use softmax or sinkhorn")
        if min(weights) < 0 or not (any(weights) or features):
            what = f"loss weights dino, ibot, koleo are {weights}"
            raise PipelineError(what, "use weights >= 0, at least one > 0")
        self.spec = spec
        self.dino_centre = Centre(dino_prototypes, spec.centre_momentum)
        self.ibot_centre = Centre(ibot_prototypes, spec.centre_momentum)
        self.features = features
        # of each micro batch of this step, `Target.mean`
        self._cls_means: list[tuple[Tensor, Tensor]] = []
        self._patch_means: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def for_pair(cls, spec: ObjectiveSpec, pair: Pair) -> Objective:
        """An objective with the numbers of prototypes of a pair's heads, and for its adapter.

        Raises:
            PipelineError: a term has a weight and the pair has not what it needs.
        """
        dino = pair.teacher.dino_head
        ibot = pair.teacher.ibot_head or dino
        if dino is None and (spec.dino_weight or spec.ibot_weight):
            what = f"the pair has no heads, but weights of DINO and iBOT in {spec}"
            raise PipelineError(what, "set them to 0, or build the pair with heads")
        prototypes = [len(head.last_layer.weight_g) if head else 0 for head in (dino, ibot)]
        learnt = FeatureObjective.for_pair(spec.features, pair)
        return cls(spec, prototypes[0], prototypes[1], learnt)

    @property
    def scores_cls(self) -> bool:
        """Whether CLS tokens go through the head."""
        return self.spec.dino_weight > 0

    @property
    def of_features_alone(self) -> bool:
        """Whether nothing is learnt but another network's features of the global views."""
        return not (self.spec.dino_weight or self.spec.ibot_weight or self.spec.koleo_weight)

    def masked(self, views: Views) -> Masked:
        """The patches that iBOT scores: the masked ones, all when distilling, none where iBOT has
        weight 0. Views that do not say it are looked at, for which the host waits.

        Raises:
            PipelineError: iBOT has a weight, and the views have no masks.
        """
        if views.masked is not None:
            return views.masked
        if not views.masks.shape[1]:
            if self.spec.ibot_weight:
                raise PipelineError(
                    f"the views have no masks, and iBOT has weight {self.spec.ibot_weight}",
                    "give the views masks (masks_for), or ObjectiveSpec(ibot_weight=0)",
                )
            return Masked(torch.zeros(0, dtype=torch.long, device=views.masks.device), 0)
        scored = self._scored(views) if self.spec.ibot_weight else views.masks[:0]
        return masked_patches(scored, multiple=-(-views.masks.numel() // PATCH_STEPS))

    def hidden(self, views: Views) -> Tensor | None:
        """Bool `[V, P]`, the patches hidden from the student: none when distilling, None where
        the views have no masks.
        """
        if not views.masks.shape[1]:
            return None
        return torch.zeros_like(views.masks) if self.spec.distil else views.masks

    def _scored(self, views: Views) -> Tensor:
        return scored_patches(views.masks, views.weights, self.spec.distil)

    def targets(self, teacher: Iterator[Answer], temperature: float) -> Iterator[Targets]:
        """Targets of a step's micro batches, in order, from the teacher's answers to them.

        With softmax centring the teacher is asked for one micro batch at a time, so that no more
        logits are held at once. Sinkhorn balances all micro batches together and must hold them
        all. Every worker must take them all and then, if the step counts, call `commit`: both sum
        over the workers.
        """
        self._cls_means, self._patch_means = [], []
        make = self._balanced if self.spec.centring == "sinkhorn" else self._centred
        if not self.features:
            return make(teacher, temperature)
        both = self.features.beside(teacher, lambda answers: make(answers, temperature))
        return (of_heads._replace(features=learnt) for of_heads, learnt in both)

    def commit(self) -> None:
        """Gives the centres the means of this step's logits. A step that was not finite must not
        call it: its logits would stay in the centres.
        """
        if self.features is not None:
            self.features.commit()
        if self.spec.centring == "sinkhorn":
            return  # balances without centres
        if self.scores_cls:
            _see(self.dino_centre, self._cls_means)
        if self.spec.ibot_weight > 0:
            _see(self.ibot_centre, self._patch_means)
        self._cls_means, self._patch_means = [], []

    def _centred(self, teacher: Iterator[Answer], temperature: float) -> Iterator[Targets]:
        while (answer := next(teacher, None)) is not None:
            cls, patch, weight = self._split(answer)
            del answer
            dino = ibot = None
            if self.scores_cls:
                dino = self._softmax(self.dino_centre, cls, temperature, weight)
                self._cls_means.append(dino.mean())
            if self.spec.ibot_weight > 0:
                ibot = self._softmax(self.ibot_centre, patch, temperature)
                self._patch_means.append(ibot.mean())
            targets = [Targets(dino, ibot)]
            del cls, patch, dino, ibot
            yield targets.pop()  # held by nobody here while it is used

    def _balanced(self, teacher: Iterator[Answer], temperature: float) -> Iterator[Targets]:
        every = [self._split(answer) for answer in teacher]
        cls, patch = [each[0] for each in every], [each[1] for each in every]
        weights = [each[2] for each in every]
        rounds, kernels = self.spec.sinkhorn_iterations, self.spec.kernels
        nothing: list[Target | None] = [None] * len(every)
        del every
        dino: Sequence[Target | None] = nothing
        ibot: Sequence[Target | None] = nothing
        if self.scores_cls:
            dino = sinkhorn_targets(cls, temperature, rounds, weights, kernels)
        if self.spec.ibot_weight > 0:
            ibot = sinkhorn_targets(patch, temperature, rounds, kernels=kernels)
        del cls, patch
        left = list(zip(dino, ibot, strict=True))
        del dino, ibot
        while left:  # a micro batch's logits are freed when its turn is over
            yield Targets(*left.pop(0))

    def _softmax(
        self, centre: Centre, logits: Tensor, temperature: float, weight: Tensor | None = None
    ) -> Target:
        used = centre.use().to(logits.device)
        (target,) = softmax_targets([logits], used, temperature, [weight], self.spec.kernels)
        return target

    def _split(self, answer: Answer) -> tuple[Tensor, Tensor, Tensor | None]:
        """The teacher's logits of CLS tokens and masked patches, whichever head they are from, and
        the weights of the first. Patches of images of weight 0 are not among them.
        """
        encoded, masked, weights, _ = answer
        if encoded is None:
            return torch.zeros(0, 0), torch.zeros(0, 0), None
        rows = len(encoded.cls) if self.scores_cls else 0
        weight = None
        if weights is not None and rows:
            weight = weights.repeat(rows // len(weights))
        if encoded.ibot is not None:
            return encoded.dino, encoded.ibot[:masked], weight
        return encoded.dino[:rows], encoded.dino[rows : rows + masked], weight

    def losses(
        self,
        student: Encoded,
        targets: Targets,
        views: Views,
        masked: Masked,
        overwrite: bool = False,
    ) -> Terms:
        """The terms of one micro batch, in fp32.

        Args:
            student: what the student says of the views.
            targets: of the same views.
            views: of one micro batch. Images of weight 0 count in no term.
            masked: the patches that were scored.
            overwrite: put gradients where the student's logits are; nobody may read these then.
        """
        spec = self.spec
        cls_rows = len(views.global_views) + len(views.local_views) if self.scores_cls else 0
        dino, ibot = [], []
        if targets.dino is not None:
            dino.append(dino_span(targets.dino, views.local_crops, views.global_crops))
        if targets.ibot is not None:
            places, first = (
                masked.places[: masked.rows],
                0 if student.ibot is not None else cls_rows,
            )
            weights = views.weights
            if weights is not None:
                weights = weights.repeat(views.global_crops)
            weights = patch_weights(self._scored(views), places, weights)
            ibot.append(Span(targets.ibot, weights, (PATCH,), first))

        def sums_of(logits: Tensor, spans: list[Span]) -> Tensor:
            return cross_entropy(
                logits, spans, 3, spec.student_temperature, overwrite, spec.kernels
            )

        if not student.dino.shape[1]:  # no heads
            sums = torch.zeros(3, device=student.cls.device)
        elif student.ibot is None:
            sums = sums_of(student.dino, dino + ibot)
        else:  # a head without rows stays in the graph: DDP waits for its gradients
            sums = sums_of(student.dino, dino) + sums_of(student.ibot, ibot)
        total = spec.dino_weight * (sums[GLOBAL] + sums[LOCAL]) + spec.ibot_weight * sums[PATCH]
        parts: dict[str, Tensor] = {}
        if spec.dino_weight > 0:
            parts |= {"dino_global": sums[GLOBAL].detach(), "dino_local": sums[LOCAL].detach()}
        if spec.ibot_weight > 0:
            parts["ibot"] = sums[PATCH].detach()
        if spec.koleo_weight > 0:
            # Each global crop by itself: two crops of one image are meant to be neighbours.
            crops = student.cls.chunk(views.global_crops)
            spread = torch.stack([koleo(x, views.weights) for x in crops]).sum()
            total = total + spec.koleo_weight * spread
            parts["koleo"] = spread.detach()
        if self.features is not None and targets.features is not None:
            learnt, terms = self.features.losses(student, targets.features, views.weights)
            total, parts = total + learnt, parts | terms
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
        """Both centres with their pending means, and the features': nested dicts of tensors."""
        state = {"dino": self.dino_centre.state_dict(), "ibot": self.ibot_centre.state_dict()}
        learnt = self.features
        return state if learnt is None else state | {"features": learnt.state_dict()}

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
        if self.features is not None:
            self.features.load_state_dict(state.get("features", {}))


def _see(centre: Centre, means: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Gives a centre the means of a step's micro batches, see `Target.mean`."""
    centre.see([mean for mean, _ in means], [counts for _, counts in means])
