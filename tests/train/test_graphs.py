"""With compiled blocks there is one graph for each kind of block, and none is made after the first
step: whatever is masked, whichever image is bad, and however deep the network is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.model.foreign import TimmSpec
from pipeline.model.groups import parameter_groups
from pipeline.model.pair import Pair, build_pair, freeze
from pipeline.train.ahead import ViewMaker
from pipeline.train.parallel.strategy import Layout, prepare
from pipeline.train.step import Objective, ObjectiveSpec, train_step
from pipeline.views.batch import Batch, Views
from pipeline.views.masked import PatchFinder, usual_length
from pipeline.views.masks import MaskSpec, masks_for
from pipeline.views.photometric import PARAMS, CompiledPhotometric, PhotometricSpec
from tests.train.small_run import HEAD, SPEC, VALUES

IMAGES = 4
COMPILED = Layout(workers=1, device=torch.device("cpu"), compile=True)
MASKS = MaskSpec((2, 2), 0.5, (0.3, 1.0))


class Graphs:
    """Counts the graphs that are compiled, and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    torch._dynamo.reset()
    counters.clear()
    counted, compiled = Graphs(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compiled(f, **{**o, "backend": counted}))
    yield counted
    torch._dynamo.reset()


def batch(step: int, bad: bool) -> Batch:
    """Masks of a step, and pixels that are all alike."""
    valid = np.ones(IMAGES, bool)
    valid[1] = not bad
    return Batch.from_chunk(
        {
            "image_ids": np.zeros((IMAGES, 16), np.uint8),
            "global_crops": np.full((IMAGES, 2, 28, 28, 3), step, np.uint8),
            "local_crops": np.full((IMAGES, 2, 14, 14, 3), step, np.uint8),
            "photometric": np.ones((IMAGES, 4, PARAMS), np.float32),
            "masks": masks_for(0, step, np.arange(IMAGES), 4 * IMAGES, MASKS),
            "labels": np.zeros(IMAGES, np.int64),
            "valid": valid,
        }
    )


def compiled_pair(depth: int, distilled: bool, **options: Any) -> Pair:
    pair = build_pair(replace(SPEC, depth=depth, drop_path=0.3), HEAD, None, 0)
    if distilled:
        pair.frozen = freeze(
            build_pair(replace(SPEC, width=48, depth=depth), HEAD, None, 1).teacher, pair.student
        )
    return prepare(pair, replace(COMPILED, **options))


@pytest.mark.parametrize(
    ("depth", "steps", "distilled", "dtype", "options"),
    [
        (2, 50, False, None, {}),
        (2, 10, True, torch.bfloat16, {}),
        (40, 3, False, torch.bfloat16, {}),
        (3, 3, False, torch.bfloat16, {"residual": torch.bfloat16}),
        (3, 3, False, torch.bfloat16, {"checkpointing": True}),
    ],
    ids=["50 steps", "distilled", "40 blocks", "bfloat16 between blocks", "checkpointing"],
)
def test_one_graph_for_each_kind_of_block_and_none_after_the_first_step(
    graphs: Graphs,
    depth: int,
    steps: int,
    distilled: bool,
    dtype: torch.dtype | None,
    options: dict[str, Any],
) -> None:
    pair = compiled_pair(depth, distilled, **options)
    objective = Objective.for_pair(ObjectiveSpec(distil=distilled), pair)
    optimizer = torch.optim.AdamW(parameter_groups(pair.student))
    patches = PatchFinder(usual_length(IMAGES, 4 * IMAGES, MASKS))
    colours = CompiledPhotometric()
    make = ViewMaker(
        PhotometricSpec(), colours, torch.device("cpu"), dtype or torch.float32, patches
    )
    masked, after_first = set(), 0
    for step in range(steps):
        views = make(batch(step, bad=step == steps // 2))
        assert (views.weights is not None) == (step == steps // 2)
        masked.add(int(views.masks.sum()))
        generator = torch.Generator().manual_seed(step)
        train_step(
            pair.student,
            pair,
            [views],
            optimizer,
            VALUES,
            objective,
            autocast_dtype=dtype,
            generator=generator,
        )
        after_first = after_first or graphs.count
    # student and what makes the targets; and colours of global and local crops
    assert graphs.count == after_first == 2 + 2
    assert len(masked) > 1
    assert not counters["graph_break"] and counters["frames"]["ok"] == counters["frames"]["total"]


def test_a_size_that_changes_is_another_graph(graphs: Graphs) -> None:
    """That the count above can tell."""
    pair = compiled_pair(2, False)
    for images in (2, 3):
        pair.student(torch.zeros(2 * images, 3, 28, 28))
    assert graphs.count == 2


@pytest.mark.long
def test_blocks_that_differ_in_a_constant_are_all_compiled(graphs: Graphs) -> None:
    """timm's blocks have each its own rate of stochastic depth, a constant of their graphs: more
    graphs than dynamo makes of one function before it leaves the rest as it is.
    """
    pytest.importorskip("timm")
    pair = build_pair(TimmSpec("vit_tiny_patch16_224", 32, 16, 3, 0.1), HEAD, None, 0)
    prepare(pair, COMPILED)
    objective = Objective.for_pair(ObjectiveSpec(), pair)
    optimizer = torch.optim.AdamW(parameter_groups(pair.student))
    views = Views(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16), torch.rand(4, 4) < 0.5, 2)
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        train_step(pair.student, pair, [views], optimizer, VALUES, objective, generator=generator)
        made.append(graphs.count)
    depth = len(pair.student.backbone.module.blocks)  # type: ignore[union-attr,arg-type]
    assert made == [3 * depth] * 2  # of each: global crops, local crops, the teacher's
    assert counters["frames"]["ok"] == counters["frames"]["total"]
