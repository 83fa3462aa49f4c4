"""One optimiser update, from views to the moved teacher.

Order (DINOv2 train/train.py): rates, teacher targets, student forward and backward, clip each
module, check that all is finite, centres, AdamW, teacher. Weights and centres change only after the
check. The host waits for the device once, for the check; and for views that do not say which
patches are masked (`Views.masked`, which the stream's do) once more for each micro batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import PipelineError, TrainError
from pipeline.loss.collectives import all_sum, world_size
from pipeline.model.groups import apply_values
from pipeline.model.pair import Encoded, Encoder, Pair, ema_update
from pipeline.schedule import StepValues
from pipeline.train.distil.features import follow_statistics
from pipeline.train.objective import Answer, Objective, ObjectiveSpec
from pipeline.train.parallel import strategy
from pipeline.train.speed.parts import part
from pipeline.views.batch import Views
from pipeline.views.masked import Masked

__all__ = ["NonFinite", "Objective", "ObjectiveSpec", "StepResult", "train_step"]


class NonFinite(TrainError):
    """A loss term or a gradient is NaN or infinite; raised on all workers before the update."""

    def __init__(self, names: Sequence[str]) -> None:
        """Name the terms, e.g. `loss/koleo` or `optim/grad_norm_backbone`."""
        super().__init__(
            f"not finite: {', '.join(names)}",
            "the step was not applied; start again with a lower learning rate or a longer warm-up",
        )
        self.names = tuple(names)


@dataclass(frozen=True)
class StepResult:
    """What a step reports."""

    scalars: dict[str, Tensor]  # 0-d, on the device: means over workers and micro batches
    stop: bool  # whether any worker was asked to end, move or save


@torch.no_grad()
def ask_teacher(pair: Pair, views: Views, patches: Masked, objective: Objective) -> Answer:
    """What makes the targets, on the global views with nothing hidden."""
    encoded = features = None
    if pair.target_maker.dino_head is not None:
        encoded = pair.target_maker(
            views.global_views,
            None,
            None,
            patches.places,
            objective.scores_cls,
            rows=patches.rows,
        )
    if pair.feature_teacher is not None and objective.features is not None:
        grid = pair.student.grid(views.global_views) if objective.features.patches else None
        features = pair.feature_teacher(views.global_views, grid)
    return Answer(encoded, patches.rows, views.weights, features)


def ask_student(
    student: Callable[..., Encoded],
    views: Views,
    patches: Masked,
    objective: Objective,
    generator: torch.Generator | None = None,
) -> Encoded:
    """The student on all views that a term is of, masked."""
    return student(
        views.global_views,
        views.local_views if len(views.local_views) and not objective.of_features_alone else None,
        objective.hidden(views),
        patches.places,
        objective.scores_cls,
        generator,
        patches.rows,
    )


@dataclass(frozen=True)
class Forward:
    """What a forward pass gives; K is 0 without heads."""

    loss: Tensor  # 0-d, with gradients: what is optimised
    parts: dict[str, Tensor]  # the unweighted terms: dino_global, dino_local, ibot, koleo, distil_*
    cls: Tensor  # [G, B, D] the teacher's CLS tokens; without heads, of the teacher of features
    teacher_logits: Tensor  # [G, B, K], without gradients
    student_logits: Tensor  # [V, B, K], global views first


def forward(
    pair: Pair,
    views: Views,
    objective: Objective,
    teacher_temperature: float = 0.04,
    generator: torch.Generator | None = None,
) -> Forward:
    """Student and teacher on views, and the loss between them; nothing is moved.

    A loop of one's own goes on with `loss.backward()`, its optimiser, `objective.commit()` for the
    centres and `ema_update(pair, momentum)`; `train_step` is all of that.

    Args:
        pair: the networks.
        views: of one micro batch.
        objective: losses and centres; DINO needs a weight above 0 there.
        teacher_temperature: of the targets.
        generator: source of the student's stochastic depth.

    Raises:
        PipelineError: views without masks where iBOT has a weight.
    """
    patches = objective.masked(views)
    answer = ask_teacher(pair, views, patches, objective)
    target = next(objective.targets(iter([answer]), teacher_temperature))
    student = ask_student(pair.student, views, patches, objective, generator)
    terms = objective.losses(student, target, views, patches)
    scored = objective.scores_cls
    rows = len(views.global_views) * scored
    said = answer.encoded or answer.features
    assert said is not None
    logits = student.dino[:0] if answer.encoded is None else answer.encoded.dino[:rows]
    return Forward(
        terms.total,
        terms.parts,
        _by_view(said.cls, views.images),
        _by_view(logits.detach(), views.images),
        _by_view(student.dino[: rows + len(views.local_views) * scored], views.images),
    )


def train_step(
    student_forward: Callable[..., Encoded],
    pair: Pair,
    micro_batches: Sequence[Views],
    optimizer: torch.optim.Optimizer,
    values: StepValues,
    objective: Objective,
    *,
    autocast_dtype: torch.dtype | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    stop: bool = False,
) -> StepResult:
    """Run one step.

    Args:
        student_forward: the student, or what wraps it (DDP, a compiled form); called once a micro
            batch.
        pair: student and teacher; the teacher is moved at the end. Targets come from the frozen
            encoder where there is one.
        micro_batches: the step's views on this worker, a list of parts of equal size. Gradients
            are averaged over them.
        optimizer: over the groups of `parameter_groups`.
        values: this step's rates.
        objective: losses and centres.
        autocast_dtype: dtype of the networks' matrix products; losses stay in fp32. None switches
            autocast off.
        generator: source of the student's stochastic depth; or one for each micro batch.
        stop: this worker was asked to end, move or save; the result says whether any was.

    Raises:
        NonFinite: on every worker, before the update, naming terms that are not finite on some
            worker.
        PipelineError: no list of micro batches, or not one generator for each of them.
    """
    # Nine arguments and no noun for them: a loop of one's own has each by itself (docs/python.md).
    _check(micro_batches, generator)
    device = micro_batches[0].global_views.device
    parts = len(micro_batches)
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * parts

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)

    def teacher(views: Views, patches: Masked) -> Answer:
        with part("teacher"), autocast():
            return ask_teacher(pair, views, patches, objective)

    apply_values(optimizer, values)
    optimizer.zero_grad(set_to_none=True)
    masked = [objective.masked(views) for views in micro_batches]
    # `map` asks the teacher when a target is asked for: see `Objective.targets`.
    targets = objective.targets(map(teacher, micro_batches, masked), values.teacher_temperature)
    reports: list[dict[str, Tensor]] = []
    for number, (views, patches) in enumerate(zip(micro_batches, masked, strict=True)):
        with part("targets"):
            target = next(targets)  # not by `zip`, which would hold the logits until the next turn
        last = number == parts - 1
        with strategy.adding_up(student_forward, last):
            with part("student forward"), autocast():
                student = ask_student(
                    student_forward, views, patches, objective, generators[number]
                )
            with part("loss"):
                terms = objective.losses(student, target, views, patches, overwrite=True)
            del target, student  # logits are freed before the backward pass needs room
            with part("backward"):
                (terms.total / parts).backward()  # type: ignore[no-untyped-call]
        reports.append(
            {f"loss/{name}": x for name, x in terms.parts.items()}
            | {f"health/{name}": x for name, x in terms.health.items()}
        )
        del terms  # and this before the next forward pass does
    means = {name: torch.stack([each[name] for each in reports]).mean() for name in reports[0]}
    with part("clip"):
        norms = _clip(pair.student, objective.spec.clip)
    with part("finite check"):
        scalars, any_stop = _agree(means, norms, stop, device)  # or raises NonFinite
    with part("optimizer"):
        objective.commit()
        optimizer.step()
    with part("teacher update"):
        ema_update(pair, values.teacher_momentum)
        if pair.teacher.dino_head is None:
            follow_statistics(pair, values.teacher_momentum)
    return StepResult(scalars, any_stop)


def _check(
    micro_batches: Sequence[Views], generator: torch.Generator | Sequence[torch.Generator] | None
) -> None:
    if isinstance(micro_batches, Views) or not micro_batches:
        got = "Views" if isinstance(micro_batches, Views) else "an empty list"
        raise PipelineError(
            f"train_step got {got}, expected a list of one or more micro batches",
            "put the views of a single micro batch into a list: [views]",
        )
    if isinstance(generator, Sequence) and len(generator) != len(micro_batches):
        raise PipelineError(
            f"{len(generator)} generators for {len(micro_batches)} micro batches",
            "give one for each, or a single one",
        )


def _clip(student: Encoder, limit: float) -> dict[str, Tensor]:
    """Limit the gradient norm of each sub-module by itself; the norms before that."""
    norms = {f"optim/grad_norm_{name}": x for name, x in strategy.clip(student, limit).items()}
    return {"optim/grad_norm": torch.stack(list(norms.values())).max(), **norms}


def _agree(
    means: dict[str, Tensor], norms: dict[str, Tensor], stop: bool, device: torch.device
) -> tuple[dict[str, Tensor], bool]:
    """Average over the workers and find out, on all of them alike, whether to go on: one sum, one
    wait.

    The norms are those of the averaged gradients and equal everywhere.
    """
    local = {**means, **norms}
    numbers = torch.stack([x.float() for x in local.values()])
    stopping = torch.full((1,), float(stop), device=device)
    message = all_sum(torch.cat([stopping, (~torch.isfinite(numbers)).float(), numbers]))
    stops, *broken = message[: 1 + len(local)].tolist()
    if any(broken):
        raise NonFinite([name for name, count in zip(local, broken, strict=True) if count])
    averaged = (message[1 + len(local) :] / world_size()).unbind()
    return dict(zip(local, averaged, strict=True)), stops > 0


def _by_view(rows: Tensor, images: int) -> Tensor:
    """`[V B, D]`, crop-major, as `[V, B, D]`."""
    return rows.view(len(rows) // images, images, rows.shape[-1])
