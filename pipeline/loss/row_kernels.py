"""Cross entropy and its gradient as Triton kernels: two passes over the student's logits in all.

The forward pass reads logits and targets once and keeps two numbers a row. The backward pass reads
them once more and writes the gradient, scaled by the gradients that come in, where the logits were
or beside them. Nothing of `[rows, K]` is kept between the two but the logits themselves.

A program has a tile of rows, and walks over some of the columns. For crops the tile is all crops
of one image, so that its targets are read once; for patches it is some patches, each with its own
target. Names as in `Span`; `crop`, `image`, `place` of each row of the tile, and `place` is its
number in the span. Sums are made in one order: the same bits each time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.loss.prototypes import Span

TILE = 4096  # numbers of a tile, for 8 warps: 16 a thread
PATCHES = 16  # rows of a tile of patches
PROGRAMS = 1024  # at least, where there are columns enough: some for each multiprocessor
WARPS = 8
JOINED = 128  # rows that one program joins
COUNTS = ("first", "images", "blocks")  # no new kernel for another number of rows


class Layout(NamedTuple):
    """How the rows of a span are cut into programs."""

    rows: int  # of a tile, a power of 2
    block: int  # columns of a tile
    programs: int  # for all rows
    splits: int  # of the columns
    blocks: int  # of each split


def layout(span: Span) -> Layout:
    """The tiles of a span."""
    images, crops = len(span.weight), len(span.terms)
    rows = triton.next_power_of_2(crops) if crops > 1 else PATCHES
    programs = images if crops > 1 else -(-images // rows)
    block = max(TILE // rows, 32)
    return Layout(rows, block, programs, *split(span.target.logits.shape[1], block, programs))


def split(length: int, block: int, programs: int) -> tuple[int, int]:
    """Parts that make `PROGRAMS` programs of `programs`, and the blocks of each."""
    blocks = -(-length // block)
    each = -(-blocks // max(1, min(blocks, PROGRAMS // max(programs, 1))))
    return -(-blocks // each), each


@triton.jit
def rows_of(program, images, ROWS: tl.constexpr, CROPS: tl.constexpr):
    """Of each row of a tile: crop, image, place, and whether there is such a row, `[ROWS]`; and the
    image whose targets it meets, `[ROWS, 1]`, or `[1, 1]` where it is one for all.
    """
    n = tl.arange(0, ROWS)
    if CROPS > 1:
        crop, image, inside = n, program + 0 * n, n < CROPS
        shared = program + tl.zeros([1, 1], tl.int32)
    else:
        crop, image, inside = 0 * n, program * ROWS + n, program * ROWS + n < images
        shared = image[:, None]
    return crop, image, crop.to(tl.int64) * images + image, inside, shared


@triton.jit
def target_sum(
    target, prototype, row, weight, shared, images, crop, column, sharp,
    K: tl.constexpr, G: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """The sum of the targets, `[ROWS, BLOCK]`, or `[1, BLOCK]` where it is one for all rows."""
    offset = tl.load(prototype + column, mask=column < K, other=0.0)[None, :]
    exists = shared < images
    counts = exists & (tl.load(weight + shared, mask=exists, other=0.0) != 0)
    valid = counts & (column < K)[None, :]
    total = tl.zeros([1, 1], tl.float32)
    for g in tl.static_range(G):
        place = (shared + g * images).to(tl.int64)
        x = tl.load(target + place * K + column[None, :], mask=valid, other=-float("inf"))
        z = x.to(tl.float32) * sharp + offset
        q = tl.exp(z - tl.load(row + place, mask=counts, other=0.0))
        if OTHERS:
            q = tl.where(crop[:, None] == g, 0.0, q)
        total = total + q
    return total


@triton.jit(do_not_specialize=COUNTS)
def scan_kernel(
    logits, target, prototype, row, weight, partial, first, images, blocks, scale, sharp,
    K: tl.constexpr, G: tl.constexpr, CROPS: tl.constexpr, OTHERS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each row and split: largest logit, sum of exponentials, sum of q times logit, sum of q."""
    part = tl.program_id(1)
    crop, image, place, inside, shared = rows_of(tl.program_id(0), images, ROWS, CROPS)
    counts = inside & (tl.load(weight + image, mask=inside, other=0.0) != 0)
    source = logits + (first + place) * K
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total, dot, mass = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    low = part * blocks * BLOCK
    for start in range(low, tl.minimum(low + blocks * BLOCK, K), BLOCK):
        column = start + tl.arange(0, BLOCK)
        valid = counts[:, None] & (column < K)[None, :]
        x = tl.load(source[:, None] + column[None, :], mask=valid, other=-float("inf"))
        s = x.to(tl.float32) * scale
        q = target_sum(
            target, prototype, row, weight, shared, images, crop, column, sharp, K, G, OTHERS
        )
        q = tl.where(valid, q, 0.0)
        mass += tl.sum(q, axis=1)
        dot += tl.sum(tl.where(valid, q * s, 0.0), axis=1)
        higher = tl.maximum(top, tl.max(s, axis=1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), axis=1)
        top = higher
    rows = images.to(tl.int64) * CROPS
    place += part * rows
    rows *= tl.num_programs(1)
    tl.store(partial + place, top, mask=inside)
    tl.store(partial + rows + place, total, mask=inside)
    tl.store(partial + 2 * rows + place, dot, mask=inside)
    tl.store(partial + 3 * rows + place, mass, mask=inside)


@triton.jit(do_not_specialize=["rows", "images", "splits"])
def join_kernel(partial, weight, loss, length, masses, rows, images, splits, BLOCK: tl.constexpr):
    """Of each row: its weighted cross entropy, log of the sum of exponentials, and sum of q."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < rows
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total, dot, mass = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    every = rows * splits
    for part in range(splits):
        source = partial + part * rows + place
        t = tl.load(source, mask=inside, other=-float("inf"))
        higher = tl.maximum(top, t)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        one = tl.load(source + every, mask=inside, other=0.0)
        total = total * tl.exp(top - shift) + one * tl.exp(t - shift)
        dot += tl.load(source + 2 * every, mask=inside, other=0.0)
        mass += tl.load(source + 3 * every, mask=inside, other=0.0)
        top = higher
    w = tl.load(weight + place % images, mask=inside, other=0.0)
    log = top + tl.log(total)
    tl.store(loss + place, tl.where(w != 0, w * (log * mass - dot), 0.0), mask=inside)
    tl.store(length + place, log, mask=inside)
    tl.store(masses + place, mass, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def gradient_kernel(
    logits, gradient, target, prototype, row, weight, length, masses, upstream,
    first, images, blocks, scale, sharp,
    K: tl.constexpr, G: tl.constexpr, TERMS: tl.constexpr, OTHERS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of rows, a tile of columns; zeros for rows of weight 0."""
    part = tl.program_id(1)
    CROPS: tl.constexpr = len(TERMS)
    crop, image, place, inside, shared = rows_of(tl.program_id(0), images, ROWS, CROPS)
    w = tl.load(weight + image, mask=inside, other=0.0)
    counts = inside & (w != 0)
    factor = tl.zeros([ROWS], tl.float32)
    for c in tl.static_range(CROPS):
        factor = tl.where(crop == c, tl.load(upstream + TERMS[c]), factor)
    factor = factor * w * scale
    log = tl.load(length + place, mask=counts, other=0.0)
    mass = tl.load(masses + place, mask=counts, other=0.0)
    at = (first + place) * K
    low = part * blocks * BLOCK
    for start in range(low, tl.minimum(low + blocks * BLOCK, K), BLOCK):
        column = start + tl.arange(0, BLOCK)
        exists = inside[:, None] & (column < K)[None, :]
        valid = exists & counts[:, None]
        places = at[:, None] + column[None, :]
        x = tl.load(logits + places, mask=valid, other=-float("inf"))
        q = target_sum(
            target, prototype, row, weight, shared, images, crop, column, sharp, K, G, OTHERS
        )
        p = tl.exp(x.to(tl.float32) * scale - log[:, None])
        slope = tl.where(valid, (p * mass[:, None] - q) * factor[:, None], 0.0)
        tl.store(gradient + places, slope.to(gradient.dtype.element_ty), mask=exists)


class Kept(NamedTuple):
    """What the backward pass needs of the rows of a span beside logits and target."""

    length: Tensor  # [C I] log of the sum of exponentials
    mass: Tensor  # [C I] sum of the target


def forward(logits: Tensor, span: Span, temperature: float) -> tuple[Tensor, Kept]:
    """Weighted cross entropy of each crop, fp32 `[C]`, and what `backward` needs.

    Args:
        logits: `[N, K]`, rows one behind the other.
        span: some of the rows.
        temperature: of the student.
    """
    images, crops = len(span.weight), len(span.terms)
    tile, rows = layout(span), images * crops
    partial = logits.new_empty(4, tile.splits, rows, dtype=torch.float32)
    # each by itself: the rows of one matrix begin where their number puts them, and Triton makes
    # another kernel for a pointer that is no multiple of 16 bytes
    loss, length, mass = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    if rows:
        target = span.target
        with torch.cuda.device_of(logits):  # Triton starts kernels on the current one
            scan_kernel[tile.programs, tile.splits](
                logits, target.logits, target.prototype, target.row, span.weight, partial,
                span.first, images, tile.blocks, 1 / temperature, 1 / target.temperature,
                K=logits.shape[1], G=span.crops, CROPS=crops, OTHERS=span.others,
                ROWS=tile.rows, BLOCK=tile.block, num_warps=WARPS,
            )  # fmt: skip
            join_kernel[(-(-rows // JOINED),)](
                partial, span.weight, loss, length, mass, rows, images, tile.splits,
                BLOCK=JOINED, num_warps=4,
            )  # fmt: skip
    return loss.view(crops, images).sum(dim=1), Kept(length, mass)


def backward(
    logits: Tensor, gradient: Tensor, span: Span, temperature: float, kept: Kept, upstream: Tensor
) -> None:
    """Writes the gradient of a span's rows.

    Args:
        logits: `[N, K]`.
        gradient: `[N, K]`; may be `logits`.
        span: some of the rows.
        temperature: of the student.
        kept: what `forward` gave.
        upstream: fp32 `[terms]`, gradients of the terms.
    """
    target, tile = span.target, layout(span)
    if not len(span.weight):
        return
    with torch.cuda.device_of(logits):
        gradient_kernel[tile.programs, tile.splits](
            logits, gradient, target.logits, target.prototype, target.row, span.weight,
            kept.length, kept.mass, upstream,
            span.first, len(span.weight), tile.blocks, 1 / temperature, 1 / target.temperature,
            K=logits.shape[1], G=span.crops, TERMS=span.terms, OTHERS=span.others,
            ROWS=tile.rows, BLOCK=tile.block, num_warps=WARPS,
        )  # fmt: skip
