"""For what a step makes the host wait: counted on a CPU, whose tensors stand for those of a GPU,
and on tensors of a GPU that have shapes and no contents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.model.groups import parameter_groups
from pipeline.model.pair import HeadSpec, Pair, build_pair
from pipeline.train.step import Objective, ObjectiveSpec, forward
from pipeline.views.batch import Views
from pipeline.views.masked import Masked, PatchFinder
from tests.train.small_run import OTHER_HEAD, SPEC, Run, views

READS = {"tolist", "item", "cpu", "numpy", "nonzero", "masked_select", "argwhere", "unique"}
READS |= {"__bool__", "__int__", "__float__", "__index__", "__complex__", "is_nonzero", "equal"}
SHAPES_FROM_VALUES = {"nonzero", "masked_select", "unique", "_unique2", "unique_dim", "bincount"}
VALUES_TO_HOST = {"_local_scalar_dense", "is_nonzero", "equal", "item"}


class Reads(TorchFunctionMode):
    """Notes what asks for values: on a GPU the host would wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or "").rsplit(".", 1)[-1]
        if name in READS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """The same below Python: in C++, in the backward pass and in the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2])
        )
        repeats = func is torch.ops.aten.repeat_interleave.Tensor
        if name in SHAPES_FROM_VALUES | VALUES_TO_HOST or by_mask or repeats:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def prepared(views: Views) -> Views:
    """As the stream gives them: with places that were found on the host."""
    finder = PatchFinder(views.masks.numel())
    return replace(views, masked=finder(views.masks, views.weights))


def waits_of(run: Run, *micro: Views, **options: Any) -> list[str]:
    with Reads() as reads, Waits() as below:
        run.step(*micro, **options)
    return sorted(reads.names + below.names)


def fused(run: Run) -> Run:
    run.optimizer = torch.optim.AdamW(parameter_groups(run.pair.student), fused=True)  # as on a GPU
    return run


@pytest.mark.parametrize("weights", [False, True], ids=["all", "a bad image"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("ibot", [None, OTHER_HEAD], ids=["shared", "separate"])
def test_a_step_waits_once(
    ibot: HeadSpec | None, centring: Any, dtype: torch.dtype | None, weights: bool
) -> None:
    run = fused(Run(ObjectiveSpec(centring=centring), ibot, drop_path=0.3))
    micro = [views(4, seed) for seed in range(2)]
    if weights:
        micro[0] = replace(micro[0], weights=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # the second has optimizer states and a pending centre
        waits = waits_of(run, *map(prepared, micro), autocast_dtype=dtype, generator=generator)
        assert waits == ["tolist"]  # the finite check


def test_views_that_do_not_say_what_is_masked_cost_one_more_each() -> None:
    run = fused(Run())
    waits = waits_of(run, views(4), views(4, seed=1))
    assert [name for name in waits if name != "nonzero"] == ["tolist"]
    assert waits.count("nonzero") >= 2


class Copies(TorchDispatchMode):
    """Notes copies from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        sources = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        source = sources[1] if name == "copy_" else sources[0] if sources else None
        moved = name in ("_to_copy", "copy_") and isinstance(source, Tensor)
        to_gpu = isinstance(out, FakeTensor) and out.fake_device.type == "cuda"
        if moved and to_gpu and source.device.type == "cpu" and source.dim():
            self.bytes.append(source.nbytes)
        return out


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_on_a_gpu_a_forward_copies_the_draws_of_stochastic_depth_and_nothing_else(
    centring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = []

    def pin(x: Tensor) -> Tensor:
        pinned.append(x.nbytes)
        return x

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda x, **_: x)  # it looks at values
    depth, kept = 2, 2 * max(int(8 * 0.7), 1)  # of 8 global and 8 local views
    with FakeTensorMode(), torch.device("cuda"):
        spec, head = replace(SPEC, drop_path=0.3), HeadSpec(20, 8, 16)
        student, teacher = (build_pair(spec, head, None, 0).student for _ in range(2))
        pair = Pair(student, teacher.requires_grad_(False).eval())  # no copy: it copies the mode
        objective = Objective.for_pair(ObjectiveSpec(centring=centring, kernels="eager"), pair)
        for centre in (objective.dino_centre, objective.ibot_centre):
            centre.value = centre.value.to("cuda")  # where the first step puts it
        both = Views(
            torch.randn(8, 3, 28, 28),
            torch.randn(8, 3, 14, 14),
            torch.zeros(8, 4, dtype=torch.bool),
            4,
            torch.ones(4),
            Masked(torch.zeros(32, dtype=torch.long), 20),
        )
        generator = torch.Generator("cpu")
        with Copies() as copies, torch.device("cpu"), torch.no_grad():
            out = forward(pair, both, objective, generator=generator)
    assert out.loss.device.type == "cuda"
    draws = 2 * depth * kept * 8
    assert copies.bytes == [draws] and draws in pinned
