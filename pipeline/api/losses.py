"""Losses, centre and teacher as functions of tensors, under the names of the field.

Each calls what a run calls. V views (G global ones first) of B images, K prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.loss import dino
from pipeline.loss.centre import Centre
from pipeline.loss.prototypes import STUDENT_TEMPERATURE, Span, check_rows, cross_entropy
from pipeline.loss.target import Target, softmax_targets
from pipeline.model.pair import move

Views = Tensor | Sequence[Tensor]
Parameters = TypeVar("Parameters", nn.Module, MutableMapping[str, Tensor])


@overload
def dino_loss(
    student: Tensor,
    teacher: Target,
    local_crops: int,
    temperature: float = ...,
    global_crops: int = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def dino_loss(
    student: Views,
    teacher: Views,
    *,
    student_temperature: float = ...,
    teacher_temperature: float = ...,
    centre: Tensor | None = ...,
) -> Tensor: ...


def dino_loss(
    student: Views,
    teacher: Views | Target,
    local_crops: int | None = None,
    temperature: float | None = None,
    global_crops: int = 2,
    **options: float | Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of the student's distribution with the teacher's: centred and sharpened.

    With logits `[B, K]` of both: the mean over the rows. With logits of views, `[V, B, K]` or a
    list of `[B, K]`, global views first, and the teacher's of the G global views: the mean over all
    pairs of a student's view and another global view's target (DINO, section 3.1). No gradient
    reaches the teacher.

    Args:
        student: the student's logits.
        teacher: the teacher's logits; or a `Target`, with `local_crops`, `temperature` and
            `global_crops` as `pipeline.loss.dino.dino_loss` takes them, which gives two terms.
        local_crops: with a `Target` only.
        temperature: with a `Target` only; of the student.
        global_crops: with a `Target` only.
        options: `student_temperature` [0.1], `teacher_temperature` [0.04], `centre` `[K]` [zeros].

    Returns:
        0-d fp32; with a `Target` the global and the local term.

    Raises:
        PipelineError: the shapes do not fit each other, or an argument goes with the other form.
    """
    if isinstance(teacher, Target):
        if local_crops is None or options or not isinstance(student, Tensor):
            raise PipelineError(
                "dino_loss with a Target takes logits [(G + L) * B, K], local_crops, temperature "
                "and global_crops",
                "give local_crops=L, or the teacher's logits instead of a Target",
            )
        rate = STUDENT_TEMPERATURE if temperature is None else temperature
        return dino.dino_loss(student, teacher, local_crops, rate, global_crops)
    if local_crops is not None or temperature is not None or global_crops != 2:
        raise PipelineError(
            "local_crops, temperature and global_crops of dino_loss go with a Target",
            "give student_temperature=… and teacher_temperature=… with the teacher's logits",
        )
    known = ("student_temperature", "teacher_temperature", "centre")
    if unknown := sorted(options.keys() - known):
        raise PipelineError(f"dino_loss has no {unknown[0]}", f"there are {', '.join(known)}")
    return _between(_stacked(student), _stacked(teacher), **options)  # type: ignore[arg-type]


def _between(
    student: Tensor,
    teacher: Tensor,
    student_temperature: float = STUDENT_TEMPERATURE,
    teacher_temperature: float = 0.04,
    centre: Tensor | None = None,
) -> Tensor:
    rank, shapes = student.ndim, f"student {list(student.shape)}, teacher {list(teacher.shape)}"
    fits = rank == teacher.ndim and student.shape[-2:] == teacher.shape[-2:] and student.numel()
    if not fits or rank not in (2, 3) or (rank == 3 and not 2 <= len(teacher) <= len(student)):
        raise PipelineError(
            f"dino_loss got {shapes}, expected both [B, K], or [V, B, K] and [G, B, K] with "
            "2 <= G <= V",
            "give views one behind the other, global ones first: torch.stack(list of [B, K])",
        )
    if not student_temperature > 0:
        raise PipelineError(f"a student temperature of {student_temperature}", "use one above 0")
    rows = teacher.detach().reshape(-1, teacher.shape[-1])
    offset = rows.new_zeros(rows.shape[-1]) if centre is None else centre.reshape(-1)
    (target,) = softmax_targets([rows], offset, teacher_temperature)
    if rank == 3:
        logits, local_views = student.flatten(0, 1), len(student) - len(teacher)
        terms = dino.dino_loss(logits, target, local_views, student_temperature, len(teacher))
        return terms[0] + terms[1]
    check_rows("dino_loss", student, target, len(target.row))
    every = Span(target, torch.full_like(target.row, 1 / len(student)), (0,))
    return cross_entropy(student, [every], 1, student_temperature)[0]


def update_centre(teacher: Views, centre: Tensor, momentum: float = 0.9) -> Tensor:
    """`momentum * centre + (1 - momentum) * mean` of the teacher's logits, over all workers too.

    Args:
        teacher: logits `[B, K]`, `[G, B, K]` or a list of `[B, K]`.
        centre: `[K]`; stays as it is.
        momentum: share of the old centre.

    Returns:
        fp32 `[K]`, for the next step: the loss of this one uses `centre`.

    Raises:
        PipelineError: the shapes do not fit each other.
    """
    logits = _stacked(teacher).detach()
    if logits.ndim not in (2, 3):
        raise PipelineError(
            f"update_centre got logits {list(logits.shape)}, expected [B, K] or [G, B, K]",
            "give the teacher's logits with their axis of images",
        )
    moving = Centre(centre.numel(), momentum)
    moving.value = centre.detach().float().reshape(-1)
    moving.see([logits.flatten(0, -2)])
    return moving.use()


@torch.no_grad()
def update_teacher(
    student_params: nn.Module | Mapping[str, Tensor],
    teacher_params: Parameters,
    momentum: float = 0.996,
) -> Parameters:
    """`teacher = momentum * teacher + (1 - momentum) * student`, in place, and the teacher again.

    Of modules the parameters move. Of mappings of names to tensors, such as `state_dict()`, all
    floats move, and what counts (integers) is copied.

    Raises:
        PipelineError: not the same names, shapes and types on both sides, a tensor that is both, or
            a teacher in half precision, where steps of `1 - momentum` are rounded away.
    """
    student, teacher = _named(student_params), _named(teacher_params)
    names = student | teacher
    different = [name for name in names if _shape(student, name) != _shape(teacher, name)]
    if different:
        name = different[0]
        raise PipelineError(
            f"student and teacher differ in {len(different)} tensors, the first is {name}: "
            f"{_shape(student, name) or 'none'} and {_shape(teacher, name) or 'none'}",
            "make the teacher with copy.deepcopy(student)",
        )
    shared = [n for n, x in teacher.items() if x.numel() and x.data_ptr() == student[n].data_ptr()]
    if shared:
        raise PipelineError(
            f"student and teacher are the same tensor in {len(shared)} places, the first is "
            f"{shared[0]}",
            "make the teacher with copy.deepcopy(student), or clone each tensor",
        )
    floats = [name for name, x in teacher.items() if x.is_floating_point()]
    for name in floats:
        ours, other = teacher[name].dtype, student[name].dtype
        if ours != other or ours not in (torch.float32, torch.float64):
            raise PipelineError(
                f"{name} is {ours} in the teacher and {other} in the student, expected float32 or "
                "float64 in both",
                "keep both in float32, and compute in half precision with torch.autocast",
            )
    for name in teacher.keys() - floats:
        teacher[name].copy_(student[name])
    move([student[name] for name in floats], [teacher[name] for name in floats], momentum)
    return teacher_params


def _named(parameters: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(parameters, nn.Module):
        return dict(parameters.named_parameters())
    if isinstance(parameters, Mapping) and all(isinstance(x, Tensor) for x in parameters.values()):
        return {name: x.detach() for name, x in parameters.items()}
    raise PipelineError(
        f"update_teacher got {type(parameters).__name__}, expected a module or names with tensors",
        "give two modules, or two mappings such as module.state_dict()",
    )


def _shape(tensors: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None


def _stacked(views: Views) -> Tensor:
    """`[B, K]` or `[V, B, K]`."""
    if isinstance(views, Tensor):
        return views
    shapes = [list(x.shape) for x in views]
    if not shapes or any(shape != shapes[0] for shape in shapes):
        raise PipelineError(f"logits of views {shapes}, expected equal [B, K]", "cut them alike")
    return torch.stack(list(views))
