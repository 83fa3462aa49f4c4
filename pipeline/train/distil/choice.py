"""What `distill.loss=auto` means: targets over prototypes where the teacher's heads fit, else its
features.
"""

from __future__ import annotations

from typing import Literal

from pipeline.config.config import Config
from pipeline.errors import ConfigError
from pipeline.plan.plan import Plan

Learnt = Literal["", "targets", "cosine", "smooth_l1"]


def chosen(config: Config, teacher: Plan | None) -> tuple[Learnt, str]:
    """What is learnt of a frozen teacher, and why `auto` did not mean targets.

    Args:
        config: the recipe.
        teacher: the plan that it was trained with; None: it is no checkpoint of ours.

    Raises:
        ConfigError: `auto` means targets, and there are fields of features alone.
    """
    distill = config.distill
    if not distill.teacher:
        return "", ""
    if distill.loss != "auto":
        return distill.loss, ""
    if distill.objective:
        return "cosine", "our own objective has the heads"
    reason = (
        "no checkpoint of ours, so without heads" if teacher is None else misfit(config, teacher)
    )
    if reason:
        return "cosine", reason
    if unread := distill.changed:
        raise ConfigError(
            f"distill.loss=auto means targets here, for the teacher's heads fit, so "
            f"{', '.join(unread)} would do nothing",
            "set distill.loss=cosine to learn its features, or leave "
            f"{'them' if len(unread) > 1 else 'it'} out",
        )
    return "targets", ""


def misfit(config: Config, teacher: Plan) -> str:
    """Why a student of this recipe cannot predict a teacher's targets; empty where it can."""
    theirs = teacher.config
    if teacher.headless:
        return "it was trained without heads"
    reasons = [
        f"its {name} has {there or 'no'} prototypes, the student's {here or 'no'}"
        for name, there, here in (
            ("head", theirs.head.prototypes, config.head.prototypes),
            ("ibot_head", _separate(theirs), _separate(config)),
        )
        if there != here
    ]
    sizes = theirs.model.patch_size, config.model.patch_size
    if sizes[0] != sizes[1]:
        reasons.append(f"its patches have {sizes[0]} pixels, the student's {sizes[1]}")
    if normalisation(theirs) != normalisation(config):
        reasons.append("it was trained with other augment.mean, augment.std or channels")
    reasons += [
        f"it was trained with loss.{name}=0"
        for name in ("dino_weight", "ibot_weight")
        if getattr(config.loss, name) and not getattr(theirs.loss, name)
    ]
    return "; ".join(reasons)


def normalisation(config: Config) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean, deviation and channels of the images of a recipe."""
    return config.augment.mean, config.augment.std, config.model.in_channels


def _separate(config: Config) -> int:
    return config.ibot_head.prototypes if config.ibot_head.separate else 0
