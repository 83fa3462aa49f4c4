"""Teacher targets as Triton kernels: what a row or a column of the logits says, in one read.

N rows, K prototypes. Sums are made in one order: the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.loss.row_kernels import JOINED, WARPS, split
from pipeline.loss.target import Facts

ROWS, BLOCK = 32, 128  # a tile: 16 numbers a thread


@triton.jit(do_not_specialize=["rows", "blocks"])
def facts_kernel(
    logits, prototype, weight, partial, sums, rows, blocks, sharp,
    K: tl.constexpr, SUMS: tl.constexpr, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each row and split: largest z = logit / temperature + prototype, sums of exp(z) and of
    z exp(z), both over exp of the largest, and where the largest is. Of each column and tile of
    rows: the sum of the logits that count.
    """
    part = tl.program_id(1)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < rows
    counts = inside
    if WEIGHTED:
        counts = inside & (tl.load(weight + place, mask=inside, other=0.0) != 0)
    source = logits + place.to(tl.int64) * K
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total, energy, where = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    low = part * blocks * BLOCK
    for start in range(low, tl.minimum(low + blocks * BLOCK, K), BLOCK):
        column = start + tl.arange(0, BLOCK)
        valid = inside[:, None] & (column < K)[None, :]
        x = tl.load(source[:, None] + column[None, :], mask=valid, other=-float("inf"))
        x = x.to(tl.float32)
        z = x * sharp + tl.load(prototype + column, mask=column < K, other=0.0)[None, :]
        best, index = tl.max(z, axis=1, return_indices=True)
        where = tl.where(best > top, (start + index).to(tl.float32), where)
        higher = tl.maximum(top, best)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        smaller = tl.exp(top - shift)
        e = tl.exp(z - shift[:, None])
        total = total * smaller + tl.sum(e, axis=1)
        energy = energy * smaller + tl.sum(tl.where(e > 0, z * e, 0.0), axis=1)
        top = higher
        if SUMS:
            counted = tl.where(valid & counts[:, None], x, 0.0)
            at = sums + tl.program_id(0).to(tl.int64) * K + column
            tl.store(at, tl.sum(counted, axis=0), mask=column < K)
    rows = rows.to(tl.int64)
    place += part * rows
    rows *= tl.num_programs(1)
    tl.store(partial + place, top, mask=inside)
    tl.store(partial + rows + place, total, mask=inside)
    tl.store(partial + 2 * rows + place, energy, mask=inside)
    tl.store(partial + 3 * rows + place, where, mask=inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def join_facts_kernel(partial, row, entropy, likeliest, rows, splits, BLOCK: tl.constexpr):
    """Of each row: log of the sum of exp(z), entropy, and its most likely prototype."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < rows
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total, energy, where = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    every = rows * splits
    for part in range(splits):
        source = partial + part * rows + place
        t = tl.load(source, mask=inside, other=-float("inf"))
        higher = tl.maximum(top, t)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        smaller, factor = tl.exp(top - shift), tl.exp(t - shift)
        one = tl.load(source + every, mask=inside, other=0.0)
        total = total * smaller + one * factor
        one = tl.load(source + 2 * every, mask=inside, other=0.0)
        energy = energy * smaller + one * factor
        where = tl.where(t > top, tl.load(source + 3 * every, mask=inside, other=0.0), where)
        top = higher
    log = top + tl.log(total)
    tl.store(row + place, log, mask=inside)
    tl.store(entropy + place, log - energy / total, mask=inside)
    tl.store(likeliest + place, where.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["rows", "blocks"])
def column_kernel(
    logits, row, partial, rows, blocks, sharp,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each column and split of the rows: log of the sum of exp(logit / temperature - row)."""
    part = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros_like(top)
    low = part * blocks * ROWS
    for start in range(low, tl.minimum(low + blocks * ROWS, rows), ROWS):
        place = start + tl.arange(0, ROWS)
        offset = tl.load(row + place, mask=place < rows, other=float("inf"))
        # a row that does not count is infinitely far away, and is not read
        valid = (offset < float("inf"))[:, None] & (column < K)[None, :]
        source = logits + place.to(tl.int64)[:, None] * K + column[None, :]
        x = tl.load(source, mask=valid, other=-float("inf"))
        z = x.to(tl.float32) * sharp - offset[:, None]
        higher = tl.maximum(top, tl.max(z, axis=0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[None, :]), axis=0)
        top = higher
    at = partial + part.to(tl.int64) * K + column
    tl.store(at, top + tl.log(total), mask=column < K)


def facts(
    logits: Tensor,
    offset: Tensor,
    temperature: float,
    weight: Tensor | None = None,
    sums: bool = False,
) -> Facts:
    """What the targets `softmax(logits / temperature + offset)` are, in one read of the logits.

    Args:
        logits: `[N, K]`.
        offset: fp32 `[K]`.
        temperature: of the teacher.
        weight: `[N]`, 0 for a row that is in no sum; None: all are.
        sums: add up the rows of logits too, for the centre.
    """
    logits = logits.contiguous()
    rows, prototypes = logits.shape
    programs = -(-rows // ROWS)
    splits, blocks = split(prototypes, BLOCK, programs)
    partial = logits.new_empty(4, splits, rows, dtype=torch.float32)
    added = logits.new_empty(programs * sums, prototypes, dtype=torch.float32)
    row, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))  # aligned
    likeliest = logits.new_empty(rows, dtype=torch.int64)
    counted = row if weight is None else weight.contiguous()
    if rows:
        with torch.cuda.device_of(logits):  # Triton starts kernels on the current one
            facts_kernel[programs, splits](
                logits, offset, counted, partial, added, rows, blocks,
                1 / temperature, K=prototypes, SUMS=sums, WEIGHTED=weight is not None,
                ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
            join_facts_kernel[(-(-rows // JOINED),)](
                partial, row, entropy, likeliest, rows, splits, BLOCK=JOINED, num_warps=4
            )
    return Facts(row, entropy, likeliest, added.sum(dim=0) if sums else None)


def column_sums(logits: Tensor, row: Tensor, temperature: float) -> Tensor:
    """`log(sum_n exp(logits / temperature - row))`, `[splits, K]`: of each part of the rows; -inf
    without any. A row with an infinite offset is in no sum.
    """
    logits = logits.contiguous()
    rows, prototypes = logits.shape
    programs = -(-prototypes // BLOCK)
    splits, blocks = split(max(rows, 1), ROWS, programs)
    partial = logits.new_empty(splits, prototypes, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        column_kernel[programs, splits](
            logits, row, partial, rows, blocks, 1 / temperature,
            K=prototypes, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return partial
