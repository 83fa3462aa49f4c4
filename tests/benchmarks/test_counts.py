"""Counts of operations, bytes, FLOPs and graphs, against what is known by hand or by torch."""

from __future__ import annotations

import counts
import fake_device
import torch
from cases import VALUES, narrow, plan_of, views_of
from torch.utils.flop_counter import FlopCounterMode

from pipeline.model.groups import parameter_groups
from pipeline.train import build
from pipeline.train.step import train_step

SMALL = narrow("vits16_8gpu")


def test_bytes_and_operations_of_known_ones():
    a, b = torch.zeros(8, 10), torch.zeros(8, 10)
    rows = torch.tensor([1, 2])
    with fake_device.Counter() as counter:
        c = (a + b).t()  # reads two and writes one of 320 bytes; the view is free
        c.mul_(2)  # reads and writes one
        c.copy_(b.t())  # what is overwritten is not read
        a.index_select(0, rows)  # two rows of 40 bytes and two numbers of 8; writes two rows
    assert counter.operations == 4
    assert counter.bytes == 3 * 320 + 2 * 320 + 2 * 320 + (80 + 16 + 80)


def test_a_question_of_the_host_is_a_wait():
    with fake_device.as_on_a_gpu():
        x = torch.zeros(3)
        with fake_device.Counter(masked=5) as counter:
            x.tolist()
            (x + 1).nonzero()
            float(x[0])
    assert counter.waits == 3


def test_flops_of_a_step_are_those_that_torch_counts():
    """On a CPU in bfloat16 attention is two products and four backward, on a GPU five backward."""
    plan = plan_of("vits16_8gpu", 4, *SMALL, "model.drop_path=0.1")
    pair = build.pair(plan.config)
    optimizer = torch.optim.AdamW(parameter_groups(pair.student), lr=0.0)
    objective = build.objective(plan.config, pair)
    with FlopCounterMode(display=False) as counter:
        train_step(
            pair.student, pair, [views_of(plan, 0)], optimizer, VALUES, objective,
            autocast_dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    real = counter.get_total_flops()
    step = counts.step_counts(plan)
    assert real * 0.98 <= step.whole.flops <= real * 1.05
    assert 0 < step.fused.bytes < step.eager.bytes
    assert step.fused.bytes < step.whole.bytes


def test_other_masks_make_no_other_graphs():
    seen = counts.graphs("vits16_8gpu", steps=4)
    assert (seen.warm_up, seen.later) == (2, 0)  # a block of the student, one of the teacher


def test_another_shape_is_seen_as_another_graph():
    with counts.counted_graphs() as backend:
        layer = torch.nn.Linear(3, 3)
        layer.compile(dynamic=False)
        for rows in (2, 2, 4):
            layer(torch.zeros(rows, 3))
    assert backend.graphs == 2


def test_a_kernel_reads_logits_and_targets_once():
    """Of 3 images, 2 global and 1 local crop, and 8 prototypes in 16 bits."""
    logits, teacher = (
        torch.zeros(9, 8, dtype=torch.bfloat16),
        torch.zeros(6, 8, dtype=torch.bfloat16),
    )
    small = {name: torch.zeros(0) for name in ("row", "weight", "partial", "length", "masses")}
    given = {"logits": logits, "target": teacher, "images": 3, "K": 8, "G": 2, **small}
    scanned = fake_device.kernel_bytes("scan_kernel", {**given, "CROPS": 3})
    assert scanned == 9 * 16 + 6 * 16
    written = fake_device.kernel_bytes("gradient_kernel", {**given, "TERMS": (0, 0, 1)})
    assert written == 9 * 16 + 6 * 16 + 9 * 16
