"""What a student learns from a teacher's features: adapter, targets and terms of a step.

B images, V = G * B global views, P patches of the student's grid, D width of the teacher.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.loss.features import FORMS, FeatureLoss, Standard, feature_loss
from pipeline.model.encoders.frozen import Adapter, Features, FeatureTeacher
from pipeline.model.pair import Encoded, Pair

SEED = 1  # added to the run's: the adapter draws other numbers than the student


@dataclass(frozen=True)
class FeatureSpec:
    """How features are learnt. A weight of 0 leaves a term out."""

    loss: FeatureLoss = "cosine"
    cls_weight: float = 1.0
    patch_weight: float = 1.0


def attach(pair: Pair, teacher: FeatureTeacher, spec: FeatureSpec, seed: int = 0) -> Pair:
    """Gives a pair a teacher of features, and student and moving average an adapter to it, in
    place; before the optimizer is made.

    Patches are learnt where both networks have them.

    Args:
        pair: with or without heads.
        teacher: made for this student's views.
        spec: says which terms there are.
        seed: of the adapter.

    Raises:
        PipelineError: an unknown loss, a negative weight, or no term is left.
    """
    if spec.loss not in FORMS or min(spec.cls_weight, spec.patch_weight) < 0:
        raise PipelineError(
            f"features are learnt by {spec.loss!r} with weights {spec.cls_weight:g} and "
            f"{spec.patch_weight:g}",
            f"use {' or '.join(FORMS)}, and weights of 0 or more",
        )
    backbone = pair.student.backbone
    patches = spec.patch_weight > 0 and backbone.has_patches
    cls_width = teacher.width if spec.cls_weight > 0 else 0
    patch_width = teacher.patch_width if patches else 0
    if not cls_width and not patch_width:
        lacking = "the student" if not backbone.has_patches else f"the teacher {teacher.name}"
        raise PipelineError(
            "nothing would be learnt of the teacher: distill.cls_weight is 0, and "
            + (f"{lacking} has no patches" if spec.patch_weight else "so is distill.patch_weight"),
            "set distill.cls_weight=1",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + SEED)
        pair.student.adapter = Adapter(backbone.width, cls_width, patch_width)
    pair.teacher.adapter = copy.deepcopy(pair.student.adapter).requires_grad_(False).eval()
    pair.feature_teacher = teacher
    return pair


class Answered(Protocol):
    """What teachers say of a micro batch."""

    @property
    def features(self) -> Features | None:
        """Of the teacher of features."""
        ...

    @property
    def weights(self) -> Tensor | None:
        """`[B]` of the images."""
        ...


A = TypeVar("A", bound=Answered)
T = TypeVar("T")


class FeatureTargets(NamedTuple):
    """A teacher's features of one micro batch, standardised; None where the term is not there."""

    cls: Tensor | None  # [V, D]
    patches: Tensor | None  # [V * P, D']


class FeatureObjective:
    """Makes targets and losses of features, and holds their means and deviations, which `commit`
    moves.
    """

    def __init__(self, spec: FeatureSpec, adapter: Adapter) -> None:
        self.spec = spec
        self.standards = {
            name: Standard(layers[-1].out_features)  # type: ignore[arg-type]
            for name, layers in (("cls", adapter.cls), ("patches", adapter.patch))
            if layers is not None
        }
        self._begun = False  # whether a step before this one counted; asked until it is so
        self._measures: dict[str, list[Tensor]] = {}  # of each micro batch of this step

    @classmethod
    def for_pair(cls, spec: FeatureSpec | None, pair: Pair) -> FeatureObjective | None:
        """For the adapter of a pair; None where there is neither.

        Raises:
            PipelineError: there is one of them alone.
        """
        adapter = pair.student.adapter
        if (spec is None) != (adapter is None):
            raise PipelineError(
                f"the pair has {'no' if adapter is None else 'a'} teacher of features, and "
                f"ObjectiveSpec(features={spec})",
                "give both (attach, FeatureSpec) or none",
            )
        return cls(spec, adapter) if spec is not None and adapter is not None else None

    @property
    def patches(self) -> bool:
        """Whether patches are learnt."""
        return "patches" in self.standards

    def beside(
        self, answers: Iterator[A], make: Callable[[Iterator[A]], Iterator[T]]
    ) -> Iterator[tuple[T, FeatureTargets]]:
        """Targets of two kinds from the same answers, in order: those that `make` makes, and these.

        Args:
            answers: to the micro batches of a step.
            make: takes the answers in order, one after the other or all at once.
        """
        waiting: deque[A] = deque()
        learnt: deque[FeatureTargets] = deque()

        def seen() -> Iterator[tuple[Features, Tensor | None]]:
            for answer in answers:
                assert answer.features is not None
                waiting.append(answer)
                yield answer.features, answer.weights

        def passing() -> Iterator[A]:
            for target in self.targets(seen()):
                learnt.append(target)
                yield waiting.popleft()

        for target in make(passing()):
            yield target, learnt.popleft()

    def targets(
        self, answers: Iterator[tuple[Features, Tensor | None]]
    ) -> Iterator[FeatureTargets]:
        """Targets of a step's micro batches, in order, from what the teacher says of them and the
        images' weights `[B]`.

        They are standardised by the steps before this one, so that a micro batch waits for no
        other. The first step has none before it: it is standardised by itself, and all of its
        features are held for that. Every worker must take all of them, and then call `commit` if
        the step counts: both sum over the workers.
        """
        self._measures = {name: [] for name in self.standards}
        self._begun = self._begun or all(float(x.count) > 0 for x in self.standards.values())
        if self._begun:
            yield from (self._target(self._measured(*answer), self.standards) for answer in answers)
            return
        features = [self._measured(*answer) for answer in answers]
        own = self._joined()
        while features:
            yield self._target(features.pop(0), own)

    def commit(self) -> None:
        """Takes this step's features into means and deviations."""
        self.standards = self._joined()
        self._measures = {}

    def _joined(self) -> dict[str, Standard]:
        return {name: x.joined(self._measures[name]) for name, x in self.standards.items()}

    def _measured(self, features: Features, weights: Tensor | None) -> Features:
        for name, standard in self.standards.items():
            rows = _rows(features, name)
            self._measures[name].append(standard.measure(rows, _each(weights, len(rows), features)))
        return features

    def _target(self, features: Features, standards: dict[str, Standard]) -> FeatureTargets:
        rows = {name: x.apply(_rows(features, name)) for name, x in standards.items()}
        return FeatureTargets(rows.get("cls"), rows.get("patches"))

    def losses(
        self, student: Encoded, targets: FeatureTargets, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term of one micro batch: the mean over the views (or patches)
        of the images that count.

        Args:
            student: with what the adapter gave.
            targets: of the same views.
            weights: `[B]` of the images, 0 for one that counts in no term; None: all count.
        """
        total = torch.zeros((), device=student.cls.device)
        parts: dict[str, Tensor] = {}
        for name, weight, ours, theirs in (
            ("distil_cls", self.spec.cls_weight, student.adapted_cls, targets.cls),
            ("distil_patch", self.spec.patch_weight, student.adapted_patches, targets.patches),
        ):
            if theirs is None:
                continue
            assert ours is not None
            counts = None
            if weights is not None:
                views = len(student.cls) // len(weights)
                counts = weights.repeat(views).repeat_interleave(len(ours) // len(student.cls))
            loss = feature_loss(ours, theirs, counts, self.spec.loss)
            total = total + weight * loss
            parts[name] = loss.detach()
        return total, parts

    def state_dict(self) -> dict[str, Any]:
        """Means and deviations: nested dicts of tensors."""
        return {name: each.state_dict() for name, each in self.standards.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            PipelineError: it is of other terms, or of features of another width.
        """
        if state.keys() != self.standards.keys():
            raise PipelineError(
                f"the checkpoint learns {' and '.join(state) or 'no features'}, this run "
                f"{' and '.join(self.standards)}",
                "set distill.cls_weight and distill.patch_weight as the run began",
            )
        self._begun = False  # asked again: the state may be that of step 0
        for name, each in self.standards.items():
            each.load_state_dict(state[name])


def _rows(features: Features, name: str) -> Tensor:
    rows: Tensor | None = getattr(features, name)
    assert rows is not None
    return rows


def _each(weights: Tensor | None, rows: int, features: Features) -> Tensor | None:
    """A weight for each row, from those of the images: rows are crop by crop, view by view."""
    if weights is None:
        return None
    views = len(features.cls)
    return weights.repeat(views // len(weights)).repeat_interleave(rows // views)


@torch.no_grad()
def follow_statistics(pair: Pair, momentum: float) -> None:
    """Moves running means and deviations of BatchNorm in the average like its weights.

    Where the average is asked for targets it gathers its own; without heads nobody asks it.
    """
    ours, theirs = (_statistics(encoder) for encoder in (pair.teacher, pair.student))
    if ours:
        torch._foreach_lerp_(ours, theirs, 1 - momentum)


def _statistics(encoder: nn.Module) -> list[Tensor]:
    norms = (m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    pairs = ((norm.running_mean, norm.running_var) for norm in norms)
    return [x for pair in pairs for x in pair if x is not None]
