"""A run small enough to step in milliseconds, for the tests of the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pipeline.model.groups import parameter_groups
from pipeline.model.pair import HeadSpec, build_pair
from pipeline.model.vit import BackboneSpec
from pipeline.schedule import StepValues
from pipeline.train.step import Objective, ObjectiveSpec, StepResult, train_step
from pipeline.views.batch import Views

SPEC = BackboneSpec(image_size=28, width=24, depth=2, heads=2, layer_scale=0.5)
HEAD = HeadSpec(prototypes=20, bottleneck=8, hidden=16)
OTHER_HEAD = HeadSpec(prototypes=12, bottleneck=4, hidden=16)
VALUES = StepValues(
    lr=1e-3, weight_decay=0.04, teacher_momentum=0.9, teacher_temperature=0.07, last_layer_lr=1e-3
)


class Run:
    """Everything one small run holds."""

    def __init__(
        self, spec: ObjectiveSpec | None = None, ibot: HeadSpec | None = None, drop_path: float = 0
    ) -> None:
        self.pair = build_pair(replace(SPEC, drop_path=drop_path), HEAD, ibot, seed=0)
        self.objective = Objective.for_pair(spec or ObjectiveSpec(), self.pair)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.pair.student), fused=True)

    def step(self, *micro: Views, forward: Any = None, **options: Any) -> StepResult:
        return train_step(
            forward or self.pair.student,
            self.pair,
            micro,
            self.optimizer,
            VALUES,
            self.objective,
            **options,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """Without the key bias, whose gradient is round-off that Adam blows up."""
        return {
            f"{role}.{name}": x.detach().clone()
            for role in ("student", "teacher")
            for name, x in getattr(self.pair, role).named_parameters()
            if not name.endswith("qkv.bias")
        }


def views(images: int, seed: int = 0, local_crops: int = 2, masked: bool = True) -> Views:
    g = torch.Generator().manual_seed(seed)
    masks = torch.rand(2 * images, 4, generator=g) < 0.4
    return Views(
        torch.randn(2 * images, 3, 28, 28, generator=g),
        torch.randn(local_crops * images, 3, 14, 14, generator=g),
        masks if masked else torch.zeros_like(masks),
        images,
    )


def split(whole: Views, parts: int) -> list[Views]:
    """Micro batches of consecutive images; rows are crop-major."""
    images = whole.images

    def cut(x: torch.Tensor) -> list[torch.Tensor]:
        crops = x.unflatten(0, (-1, images))
        return [c.flatten(0, 1) for c in crops.split(images // parts, dim=1)]

    tensors = zip(cut(whole.global_views), cut(whole.local_views), cut(whole.masks), strict=True)
    return [Views(*each, images // parts) for each in tensors]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def poison_view(v: Views) -> Views:
    v.local_views[0, 0, 0, 0] = float("nan")
    return v
