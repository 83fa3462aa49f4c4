"""Operations that are counted instead of computed: what a GPU would be asked to do.

Fake tensors have shapes and no contents. Those of a GPU cannot go backward on a machine without
one, so these are of the CPU, and what depends on the device is made as on a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from pipeline.loss import prototypes, target
from pipeline.model import block

aten = torch.ops.aten

OVERWRITTEN = {aten.copy_.default, aten.fill_.Scalar, aten.zero_.default}  # before it is read
PICKED = {  # of their first argument they read as much as they give
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.embedding.default,
}
# What stands for a GPU's attention on fake tensors of the CPU; the counter of torch lacks them.
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Fake(FakeTensorMode):
    """Fake tensors that are copied with the modules that hold them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Fake:
        return self


class Counter(TorchDispatchMode):
    """Counts what passes through it; answers what the host asks the device for.

    Args:
        masked: masked patches, where the host asks for their places.
    """

    def __init__(self, masked: int = 0) -> None:
        super().__init__()
        self.masked = masked
        self.operations = self.bytes = self.flops = self.waits = 0
        self._reading = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation is aten._local_scalar_dense.default:
            self.waits += not self._reading  # a list is read at once
            self._reading = True
            return 0.0
        if operation is aten.nonzero.default:
            self.waits += 1
            self.operations += 1
            return args[0].new_empty((self.masked, args[0].ndim), dtype=torch.long)
        result = operation(*args, **kwargs)
        if not _is_free(operation):
            self._reading = False
            self.operations += 1
            self.bytes += moved(operation, args, kwargs, result)
            self.flops += _flops(operation, args, kwargs, result)
        return result


def _is_free(operation: Any) -> bool:
    """Whether it does nothing on a device: views, questions, memory that is not filled."""
    name = operation._schema.name
    views = any(r.alias_info and not r.alias_info.is_write for r in operation._schema.returns)
    others = ("aten::_unsafe_view", "aten::detach", "aten::lift_fresh")
    return views or name in others or name.startswith(("prim::", "profiler::")) or "empty" in name


def moved(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that an operation reads and writes, each number once."""
    read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if not written and operation._schema.name.endswith("_"):  # a list, in place
        written = [x for x in tree_leaves(args[0]) if isinstance(x, Tensor)]
    if operation in OVERWRITTEN:
        read = read[1:]
    elif operation in PICKED:
        read = read[1:] + written
    return sum(x.numel() * x.element_size() for x in read + written)


def _flops(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    if operation is ATTENTION:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if operation is ATTENTION_BACKWARD:  # twice the forward: what is computed again is not useful
        return 2 * sdpa_flop_count(*(x.shape for x in args[1:4]))
    count = flop_registry.get(operation._overloadpacket)
    return count(*args, **kwargs, out_val=result) if count else 0


def kernel_bytes(name: str, given: dict[str, Any]) -> int:
    """What a Triton kernel of `pipeline/loss` moves between memory and the chip.

    Logits and targets count once, and what a kernel leaves for the next one. Offsets of prototypes
    stay in the cache: a few hundred KiB.

    Args:
        name: of the kernel.
        given: its arguments by name.
    """

    def whole(*names: str) -> int:
        return sum(given[x].numel() * given[x].element_size() for x in names)

    if name in ("scan_kernel", "gradient_kernel"):
        crops = given["CROPS"] if "CROPS" in given else len(given["TERMS"])
        one = given["images"] * given["K"] * given["logits"].element_size()
        targets = given["G"] * given["images"] * given["K"] * given["target"].element_size()
        if name == "scan_kernel":
            return crops * one + targets + whole("row", "weight", "partial")
        return 2 * crops * one + targets + whole("row", "weight", "length", "masses")
    if name == "facts_kernel":
        return whole("logits", "partial") + (whole("sums") if given["SUMS"] else 0)
    if name == "column_kernel":
        return whole("logits", "row", "partial")
    if name == "join_kernel":
        return whole("partial", "loss", "length", "masses")
    if name == "join_facts_kernel":
        return whole("partial", "row", "entropy", "likeliest")
    raise KeyError(f"kernel_bytes does not know {name}")


def _counted_launch(kernel: Any, grid: Any) -> Any:
    """In the place of a kernel's launch."""

    def launch(*args: Any, **kwargs: Any) -> None:
        settings = {k: x for k, x in kwargs.items() if k in kernel.arg_names}
        given = inspect.signature(kernel.fn).bind(*args, **settings).arguments
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, Counter):
                mode.operations += 1
                mode.bytes += kernel_bytes(kernel.fn.__name__, given)

    return launch


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Fake tensors of the CPU, with the attention, the losses and the lists of tensors of a GPU."""
    from triton.runtime.jit import KernelInterface

    def wanted(kernels: str, logits: Tensor) -> bool:
        return kernels != "eager"

    changes = (
        (block, "_attend", F.scaled_dot_product_attention),
        (torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
        (prototypes, "fused", wanted),
        (target, "fused", wanted),
        (target, "CACHED", target.CHUNK),  # parts of the size that a GPU takes
        (KernelInterface, "__getitem__", _counted_launch),
    )
    with ExitStack() as stack:
        for place, name, value in changes:
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(Fake())
        yield
