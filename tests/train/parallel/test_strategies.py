"""DDP and FSDP on two workers over gloo: the same steps, to rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.parallel.group import Case, in_group, train

DDP = {
    "softmax": Case(),
    "sinkhorn": Case(centring="sinkhorn"),
    "softmax, accumulated": Case(accumulation=2),
    "sinkhorn, accumulated": Case(centring="sinkhorn", accumulation=2),
    "shared head": Case(ibot=None),
    "swiglu, no registers": Case(options={"ffn": "swiglu", "registers": 0}),
}
FSDP = {name: replace(case, strategy="fsdp") for name, case in DDP.items()}
HALF, SMALL = torch.bfloat16, {"steps": 4}
# The others are named by what differs from the first case.
OTHERS = {
    "ddp, again": replace(DDP["softmax"], checkpointing=True),
    "fsdp, again": replace(FSDP["sinkhorn, accumulated"], checkpointing=True),
    "ddp, compiled": Case(compile=True, **SMALL),
    "fsdp, compiled, again": Case("fsdp", compile=True, checkpointing=True, **SMALL),
    "ddp, half": Case(precision=HALF, **SMALL),
    "fsdp, half": Case("fsdp", precision=HALF, **SMALL),
    "ddp, half residual": Case(precision=HALF, residual=HALF, **SMALL),
    "fsdp, half residual": Case("fsdp", precision=HALF, residual=HALF, **SMALL),
    "ddp, half sums": Case(reduce=HALF, **SMALL),
    "fsdp, half sums": Case("fsdp", reduce=HALF, **SMALL),
    "ddp, timm": Case(timm="test_vit", **SMALL),
    "fsdp, timm, again": Case("fsdp", timm="test_vit", checkpointing=True, **SMALL),
    "ddp, short": Case(**SMALL),
    "ddp, norms": Case(norm="batch", drop_path=0.0, **SMALL),
    "fsdp, norms": Case("fsdp", norm="batch", drop_path=0.0, **SMALL),
    "ddp, residual": Case(norm="batch", residual_network=True, **SMALL),
    "fsdp, residual": Case("fsdp", norm="batch", residual_network=True, **SMALL),
}

Ranks = list[dict[str, Any]]


@dataclass
class Runs:
    """What both ranks end with, by the names of the cases."""

    ddp: dict[str, Ranks]
    fsdp: dict[str, Ranks]
    others: dict[str, Ranks]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cases = [*DDP.values(), *FSDP.values(), *OTHERS.values()]
    out = iter(zip(*in_group(tmp_path_factory.mktemp("group"), train, *cases), strict=True))
    return Runs(*({name: list(next(out)) for name in names} for names in (DDP, FSDP, OTHERS)))


def assert_close(
    a: Mapping[str, Any], b: Mapping[str, Any], atol: float, half: bool = False
) -> None:
    """With `half`, sums of what was computed in half may differ by the 8 bits that it has."""
    sums = 2**-8 * largest_moment(a) if half else atol
    allowed = {"student": atol, "teacher": atol, "moments": sums, "centres": sums}
    for part, tolerance in allowed.items():
        assert a[part].keys() == b[part].keys()
        for name, x in a[part].items():
            torch.testing.assert_close(
                x, b[part][name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert a["names"] == b["names"]
    assert len(a["steps"]) == len(b["steps"])
    relative = 2**-7 if half else 10 * atol
    for ours, theirs in zip(a["steps"], b["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=relative, abs=atol)


def largest_moment(a: Mapping[str, Any]) -> float:
    return max(float(x.abs().max()) for x in a["moments"].values())


@pytest.mark.long
@pytest.mark.parametrize("name", DDP)
def test_fsdp_is_ddp(runs: Runs, name: str) -> None:
    ddp, fsdp = runs.ddp[name][0], runs.fsdp[name][0]
    assert_close(ddp, fsdp, atol=1e-5)
    moved = max(float((x - ddp["teacher"][n]).abs().max()) for n, x in ddp["student"].items())
    assert moved > 1e-3  # what is compared has moved by more than what is allowed


@pytest.mark.long
@pytest.mark.parametrize("name", FSDP)
def test_ranks_of_fsdp_agree_and_hold_half_each(runs: Runs, name: str) -> None:
    one, other = runs.fsdp[name]
    assert_close(one, other, atol=0)
    whole = sum(x.numel() for x in one["student"].values())
    assert one["held"] + other["held"] == whole
    assert abs(one["held"] - other["held"]) < 0.1 * whole
    assert runs.ddp[name][0]["held"] == whole


@pytest.mark.long
def test_blocks_that_are_computed_again_change_no_bit(runs: Runs) -> None:
    assert_close(runs.others["ddp, again"][0], runs.ddp["softmax"][0], atol=0)
    again = runs.others["fsdp, again"][0]
    assert_close(again, runs.fsdp["sinkhorn, accumulated"][0], atol=0)


@pytest.mark.long
def test_a_compiled_block_is_one_graph_in_a_group(runs: Runs) -> None:
    """One for the teacher and one for the student, with DDP's buckets and with FSDP's hooks."""
    for name in ("ddp, compiled", "fsdp, compiled, again"):
        one = runs.others[name][0]
        assert (one["graphs"], one["breaks"]) == (2, 0), name
        assert_close(one, runs.others["ddp, short"][0], atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("ddp", "fsdp"),
    [
        ("ddp, half", "fsdp, half"),
        ("ddp, half residual", "fsdp, half residual"),
        ("ddp, timm", "fsdp, timm, again"),
    ],
)
def test_weights_that_travel_in_half_are_those_that_autocast_uses(
    runs: Runs, ddp: str, fsdp: str
) -> None:
    """How sums in half are ordered depends on the processor: moments are 1e-5 apart without AMX,
    6e-5 with it.
    """
    assert_close(runs.others[ddp][0], runs.others[fsdp][0], atol=3e-5, half=True)


@pytest.mark.long
@pytest.mark.parametrize("name", ["norms", "residual"])
def test_batch_norm_does_not_know_how_many_workers_there_are(runs: Runs, name: str) -> None:
    """It normalises by the micro batch, so one worker with the micro batches of two does their
    steps, and FSDP does those of DDP. Running means, which nothing is trained with, are worker 0's.
    """
    ddp, fsdp = (runs.others[f"{strategy}, {name}"] for strategy in ("ddp", "fsdp"))
    assert_close(ddp[0], fsdp[0], atol=1e-5)
    alone = train(OTHERS[f"ddp, {name}"], rank=0, workers=1)
    running = {n for n in alone["student"] if "running" in n or "batches" in n}
    assert any("dino_head.mlp" in n for n in running) and any("input_norm" in n for n in running)
    moved = 0
    for part in ("student", "teacher"):
        for n, x in alone[part].items():
            if n not in running:
                torch.testing.assert_close(x, ddp[0][part][n], rtol=1e-4, atol=1e-5, msg=n)
                torch.testing.assert_close(x, ddp[1][part][n], rtol=1e-4, atol=1e-5, msg=n)
            elif "mean" in n:
                moved += not torch.equal(ddp[0][part][n], ddp[1][part][n])
    assert moved  # the means are each worker's own


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    return max(float((x - b["moments"][n]).abs().max()) for n, x in a["moments"].items())


@pytest.mark.long
def test_lower_types_are_used_where_they_are_asked_for(runs: Runs) -> None:
    """They change something, and no more than their 8 bits allow."""
    short, half = runs.others["ddp, short"][0], runs.others["ddp, half"][0]
    largest = largest_moment(short)
    for name, beside in (
        ("ddp, half sums", short),
        ("fsdp, half sums", short),
        ("ddp, half residual", half),
        ("fsdp, half residual", half),
    ):
        assert 1e-5 < distance(runs.others[name][0], beside) < 0.05 * largest, name
        one, other = runs.others[name]
        assert_close(one, other, atol=0)


@pytest.mark.long
def test_a_frozen_last_layer_and_a_frozen_backbone_stay(tmp_path: Path) -> None:
    """`values` of the group: in two steps the prototypes, in the next two the backbone."""
    cases = [Case(strategy=s, steps=n) for s in ("ddp", "fsdp") for n in (1, 2, 3, 4, 5)]
    out = in_group(tmp_path, train, *cases)[0]
    for runs in (out[:5], out[5:]):
        one, two, _, four, five = (run["student"] for run in runs)
        for name in one:
            assert torch.equal(one[name], two[name]) == ("last_layer" in name), name
            assert torch.equal(two[name], four[name]) == name.startswith("backbone."), name
            assert not torch.equal(four[name], five[name]), name
