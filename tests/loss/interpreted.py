"""The Triton kernels on a CPU, against plain loops in double precision.

`test_kernels.py` runs this file in a process of its own, where TRITON_INTERPRET=1 is set before
Triton is imported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from pipeline.errors import PipelineError
from pipeline.loss import row_kernels, target_kernels
from pipeline.loss.dino import dino_loss
from pipeline.loss.form import fused
from pipeline.loss.ibot import ibot_loss
from pipeline.loss.prototypes import Span, cross_entropy
from pipeline.loss.target import Target, sinkhorn_targets, softmax_targets

SIZES = [5, 70, 300]  # prototypes: less than a tile, none of them a multiple of it


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def target_of(rows: int, prototypes: int, seed: int, dtype: torch.dtype) -> Target:
    """A target whose rows do not sum to 1."""
    logits = (0.3 * draw(rows, prototypes, seed=seed)).to(dtype)
    return Target(logits, 0.1, draw(prototypes, seed=seed + 1), 1 + draw(rows, seed=seed + 2))


def spans_of(prototypes: int, dtype: torch.dtype) -> list[Span]:
    """3 images of 2 + 3 crops, one row of nothing, 37 patches; some weights are 0."""
    images = torch.tensor([0.5, 0.0, 2.0])
    patches = draw(37, seed=7).abs()
    patches[[0, 4, 36]] = 0
    return [
        Span(target_of(6, prototypes, 10, dtype), images, (0, 0, 1, 1, 1), others=True),
        Span(target_of(37, prototypes, 20, dtype), patches, (2,), first=16),
    ]


def plain(logits: Tensor, spans: list[Span]) -> Tensor:
    """Three terms, row by row in float64."""
    terms = [logits.new_zeros(()) for _ in range(3)]
    for span in spans:
        t, images = span.target, len(span.weight)
        q = (t.logits.double() / t.temperature + t.prototype - t.row[:, None]).exp()
        for crop, term in enumerate(span.terms):
            for image in range(images):
                s = (logits[span.first + crop * images + image] / 0.2).log_softmax(dim=0)
                for g in range(len(q) // images):
                    if not (span.others and g == crop):
                        pair = -(q[g * images + image] * s).sum()
                        terms[term] = terms[term] + float(span.weight[image]) * pair
    return torch.stack(terms)


@pytest.mark.parametrize("programs", [1, 1024])  # splits of the columns
@pytest.mark.parametrize("prototypes", SIZES)
def test_terms_and_gradient(
    prototypes: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_kernels, "PROGRAMS", programs)
    monkeypatch.setattr(row_kernels, "TILE", 512)
    spans, upstream = spans_of(prototypes, torch.float32), torch.tensor([2.0, -0.7, 0.3])
    logits = (0.3 * draw(55, prototypes, seed=1)).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    expected = plain(exact, spans)
    sums = cross_entropy(logits, spans, 3, 0.2, kernels="triton")
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
    sums.backward(upstream, retain_graph=True)
    (gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-4, atol=1e-5)
    assert not logits.grad[[1, 4, 7, 10, 13, 15, 16, 20, 52, 53, 54]].any()
    with pytest.raises(RuntimeError, match="one backward pass"):
        sums.backward(upstream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_type_of_logits_is_the_eager_form(dtype: torch.dtype) -> None:
    spans = spans_of(70, dtype)
    logits = [(0.3 * draw(53, 70, seed=1)).to(dtype).requires_grad_() for _ in range(2)]
    for x, kernels in zip(logits, ("triton", "eager"), strict=True):
        sums = cross_entropy(x, spans, 3, 0.2, kernels=kernels)
        (sums @ torch.tensor([1.0, 2.0, 3.0])).backward()
        assert x.grad.dtype == dtype and sums.dtype == torch.float32
    # the eager form rounds the gradient twice: before and after its factor
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(logits[0].grad, logits[1].grad, rtol=max(rounding, 1e-4), atol=1e-5)


@pytest.mark.parametrize("kernels", ["triton", "eager"])
def test_a_gradient_where_the_logits_were(kernels: str) -> None:
    spans, results = spans_of(70, torch.bfloat16), []
    for overwrite in (False, True):
        leaf = (0.3 * draw(53, 70, seed=1)).requires_grad_()
        logits = leaf.bfloat16()
        sums = cross_entropy(logits, spans, 3, 0.2, overwrite, kernels)  # type: ignore[arg-type]
        places: list[int] = []
        logits.register_hook(lambda g, places=places: places.append(g.data_ptr()))
        sums.sum().backward()
        assert (places == [logits.data_ptr()]) == overwrite
        results.append((sums.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_matrices_in_another_order_of_memory() -> None:
    counts = torch.tensor([1.0, 9.0, 0.0, 9.0, 1.0, 9.0])[::2].repeat(2)
    results = []
    for dense in (True, False):

        def laid(x: Tensor, dense: bool = dense) -> Tensor:
            return x if dense else x.T.contiguous().T

        (target,) = softmax_targets(
            [laid(draw(6, 70))], draw(70, seed=1), 0.1, [counts], kernels="triton"
        )
        leaf = draw(9, 70, seed=2).requires_grad_()
        terms = dino_loss(laid(leaf), target, 1, kernels="triton")
        patch = ibot_loss(
            laid(leaf[:6]), target, laid(draw(6, 2, seed=3))[:, 0].abs(), kernels="triton"
        )
        sum(terms, start=2 * patch).backward()
        results.append([*terms, patch.detach(), leaf.grad, target.entropy()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [53, 54])
def test_pointers_are_aligned_whatever_the_number_of_rows(rows: int) -> None:
    span = Span(target_of(rows, 72, 20, torch.float32), torch.ones(rows), (0,))
    _, kept = row_kernels.forward(draw(rows, 72), span, 0.2)
    facts = target_kernels.facts(draw(rows, 72), torch.zeros(72), 0.5)
    pointers = [x.data_ptr() for x in (*kept, facts.row, facts.entropy, facts.likeliest)]
    assert [pointer % 16 for pointer in pointers] == [0] * 5


def test_the_same_bits_each_time() -> None:
    def once() -> list[Tensor]:
        x = (0.3 * draw(53, 300, seed=1)).requires_grad_()
        sums = cross_entropy(x, spans_of(300, torch.float32), 3, 0.2, kernels="triton")
        sums.sum().backward()
        (target,) = sinkhorn_targets([x.detach()], 0.1, kernels="triton")
        return [sums.detach(), x.grad, target.row, target.prototype, target.entropy()]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_no_rows() -> None:
    span = Span(target_of(0, 70, 0, torch.float32), torch.zeros(0), (2,), first=4)
    logits = draw(4, 70).requires_grad_()
    sums = cross_entropy(logits, [span], 3, 0.2, kernels="triton")
    sums.sum().backward()
    assert not sums.detach().any() and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 37])
def test_what_kernels_write_is_aligned_whatever_the_rows(rows: int) -> None:
    """Triton makes another kernel for a pointer that is no multiple of 16, while a run goes on."""
    seen = target_kernels.facts(draw(rows, 70), draw(70, seed=1), 0.5, sums=True)
    span = Span(target_of(rows, 70, 3, torch.float32), torch.ones(rows), (0,))
    _, kept = row_kernels.forward(draw(rows, 70), span, 0.2)
    tensors = [x for x in (*seen, *kept) if x is not None]
    assert [x.data_ptr() % 16 for x in tensors] == [0] * 6
    assert all(x.is_contiguous() and len(x) == rows for x in (seen.row, seen.entropy, *kept))


def test_kernels_start_on_the_device_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one: a process may see all GPUs of its machine."""
    inside: list[bool] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    def starts(*arguments: object, **options: object) -> None:
        started.append(bool(inside))

    started: list[bool] = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (row_kernels, target_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setitem(vars(module), name, defaultdict(lambda: starts))
    span = spans_of(70, torch.float32)[0]
    _, kept = row_kernels.forward(draw(16, 70), span, 0.2)
    row_kernels.backward(draw(16, 70), draw(16, 70), span, 0.2, kept, torch.ones(2))
    target_kernels.facts(draw(6, 70), draw(70), 0.5)
    target_kernels.column_sums(draw(6, 70), draw(6), 0.5)
    assert started == [True] * 6


def test_rows_beyond_two_to_the_31_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels, "TILE", 2**19)  # few tiles, which the interpreter is slow with
    prototypes, first, rows = 131072, 16500, 2
    logits = torch.empty(first + rows, prototypes, dtype=torch.bfloat16)  # touched where it is read
    logits[first:] = draw(rows, prototypes).bfloat16()
    span = Span(target_of(rows, prototypes, 3, torch.bfloat16), torch.ones(rows), (0,), first)
    near = Span(span.target, span.weight, (0,))
    numbers, gradients = [], []
    for matrix, where in ((logits, span), (logits[first:].clone(), near)):
        sums, kept = row_kernels.forward(matrix, where, 0.2)
        row_kernels.backward(matrix, matrix, where, 0.2, kept, torch.ones(1))
        numbers.append(sums)
        gradients.append(matrix[where.first :])
    assert torch.equal(*numbers) and torch.equal(*gradients)


@pytest.mark.parametrize("programs", [1, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "prototypes"), [(1, 5), (37, 300), (70, 129)])
def test_facts_and_columns(
    rows: int, prototypes: int, dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_kernels, "PROGRAMS", programs)
    logits, offset = draw(rows, prototypes).to(dtype), draw(prototypes, seed=1)
    weight = (torch.arange(rows) % 3 != 1).float()
    z = logits.double() / 0.5 + offset
    q = z.softmax(dim=1)
    seen = target_kernels.facts(logits, offset, 0.5, weight, sums=True)
    torch.testing.assert_close(seen.row.double(), z.logsumexp(dim=1), rtol=1e-5, atol=1e-5)
    entropy = -(q * q.log()).sum(dim=1)
    torch.testing.assert_close(seen.entropy.double(), entropy, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen.likeliest, z.float().argmax(dim=1))
    total = (logits.double() * weight[:, None]).sum(dim=0)
    torch.testing.assert_close(seen.total.double(), total, rtol=1e-4, atol=1e-5)
    row = seen.row.masked_fill(weight == 0, torch.inf)
    parts = target_kernels.column_sums(logits, row, 0.5)
    columns = (logits.double() / 0.5 - row[:, None]).logsumexp(dim=0)
    torch.testing.assert_close(parts.logsumexp(dim=0).double(), columns, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_targets_are_those_of_the_eager_form(centring: str) -> None:
    logits = [draw(9, 70), draw(0, 70), draw(40, 70, seed=2)]
    weights = [(torch.arange(9) < 7).float(), None, None]
    ours, theirs = (
        sinkhorn_targets(logits, 0.1, 3, weights, kernels)
        if centring == "sinkhorn"
        else softmax_targets(logits, draw(70, seed=4), 0.1, weights, kernels)
        for kernels in ("triton", "eager")
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.facts is not None and other.facts is None
        torch.testing.assert_close(
            mine.probabilities(), other.probabilities(), rtol=1e-4, atol=1e-7
        )
        torch.testing.assert_close(mine.entropy(), other.entropy(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.mean(), other.mean())
        assert mine.prototypes_used() == other.prototypes_used()


def forward_bytes(span: Span, element: int) -> int:
    """Logits and targets once, and numbers of a row, a prototype or a split; cached or not."""
    tile, images, prototypes = (
        row_kernels.layout(span),
        len(span.weight),
        span.target.logits.shape[1],
    )
    rows = images * len(span.terms)
    blocks = -(-prototypes // tile.block)
    numbers = tile.programs * prototypes  # offsets of the prototypes
    numbers += tile.splits * rows + blocks * images * (1 + span.crops)  # weights, offsets of rows
    numbers += 2 * 4 * tile.splits * rows + rows + 3 * rows  # partial sums, and what is kept
    return (rows + span.crops * images) * prototypes * element + 4 * numbers


def backward_bytes(span: Span, element: int) -> int:
    tile, images, prototypes = (
        row_kernels.layout(span),
        len(span.weight),
        span.target.logits.shape[1],
    )
    rows = images * len(span.terms)
    blocks = -(-prototypes // tile.block)
    numbers = tile.programs * prototypes + blocks * images * (1 + span.crops)
    numbers += tile.splits * (3 * rows + tile.programs * len(span.terms))
    return (2 * rows + span.crops * images) * prototypes * element + 4 * numbers


def facts_bytes(rows: int, prototypes: int, element: int, sums: bool = False) -> int:
    programs = -(-rows // target_kernels.ROWS)
    splits, _ = row_kernels.split(prototypes, target_kernels.BLOCK, programs)
    numbers = programs * prototypes * (1 + 2 * sums)  # offsets; sums of rows, added up after
    numbers += 2 * 4 * splits * rows + 4 * rows  # partial sums; row, entropy, likeliest
    return rows * prototypes * element + 4 * (numbers + prototypes * sums)


def column_bytes(rows: int, prototypes: int, element: int) -> int:
    programs = -(-prototypes // target_kernels.BLOCK)
    splits, _ = row_kernels.split(max(rows, 1), target_kernels.ROWS, programs)
    return rows * prototypes * element + 4 * (programs * rows + splits * prototypes)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each load and store of kernels."""
    moved: list[int] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers: object, mask: object) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self, pointers, mask, *others):
        moved.append(size(pointers, mask))
        return load(self, pointers, mask, *others)

    def counted_store(self, pointers, value, mask, *others):
        moved.append(size(pointers, mask))
        return store(self, pointers, value, mask, *others)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        yield moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_and_targets_are_read_once_in_each_pass(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, prototypes, element = draw(53, 300).to(dtype), 300, torch.empty(0, dtype=dtype).itemsize
    for span in spans_of(300, dtype):
        all_count = Span(span.target, torch.ones_like(span.weight), span.terms, span.first, True)
        with counted(monkeypatch) as moved:
            _, kept = row_kernels.forward(logits, all_count, 0.2)
        assert sum(moved) == forward_bytes(all_count, element)
        with counted(monkeypatch) as moved:
            row_kernels.backward(logits, logits, all_count, 0.2, kept, torch.ones(3))
        assert sum(moved) == backward_bytes(all_count, element)
    rows = len(logits)
    for sums in (False, True):
        with counted(monkeypatch) as moved:
            target_kernels.facts(logits, torch.zeros(prototypes), 0.5, sums=sums)
        after = -(-rows // target_kernels.ROWS) + 1  # torch adds the sums of the rows up
        added = 4 * prototypes * after * sums
        said = facts_bytes(rows, prototypes, element, sums)
        assert sum(moved) + added == said
    with counted(monkeypatch) as moved:
        target_kernels.column_sums(logits, torch.zeros(rows), 0.5)
    assert sum(moved) == column_bytes(rows, prototypes, element)


def test_the_form_that_computes() -> None:
    x = draw(2, 3)
    assert fused("auto", x) and fused("triton", x) and not fused("eager", x)
    with pytest.raises(PipelineError, match="loss kernels 'cuda'"):
        fused("cuda", x)  # type: ignore[arg-type]
