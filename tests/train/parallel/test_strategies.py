"""DDP and FSDP on two workers over gloo: the same steps, to rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.parallel.group import STEPS, Case, in_group, train

DDP = {
    "softmax": Case(),
    "sinkhorn": Case(centring="sinkhorn"),
    "softmax, accumulated": Case(accumulation=2),
    "sinkhorn, accumulated": Case(centring="sinkhorn", accumulation=2),
    "shared head": Case(ibot=None),
    "swiglu, no registers": Case(options={"ffn": "swiglu", "registers": 0}),
}
FSDP = {name: replace(case, strategy="fsdp") for name, case in DDP.items()}
AGAIN = {  # computed again in the backward pass: the same numbers to the last bit
    "softmax": (replace(DDP["softmax"], checkpointing=True), "ddp"),
    "sinkhorn, accumulated": (
        replace(FSDP["sinkhorn, accumulated"], checkpointing=True),
        "fsdp",
    ),
}

Runs = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runs]:
    cases = [*DDP.values(), *FSDP.values(), *(case for case, _ in AGAIN.values())]
    out = in_group(tmp_path_factory.mktemp("group"), train, *cases)
    by_case = list(zip(*out, strict=True))
    names = [*DDP, *FSDP, *AGAIN]
    parts = {"ddp": len(DDP), "fsdp": len(FSDP), "again": len(AGAIN)}
    result, first = {}, 0
    for part, count in parts.items():
        each = zip(names[first : first + count], by_case[first : first + count], strict=True)
        result[part] = {name: list(ranks) for name, ranks in each}
        first += count
    return result


def assert_close(a: Mapping[str, Any], b: Mapping[str, Any], atol: float) -> None:
    for part in ("student", "teacher", "moments", "centres"):
        assert a[part].keys() == b[part].keys()
        for name, x in a[part].items():
            torch.testing.assert_close(
                x, b[part][name], rtol=atol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert a["names"] == b["names"]
    assert len(a["steps"]) == len(b["steps"]) == STEPS
    for ours, theirs in zip(a["steps"], b["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=10 * atol, abs=atol)


@pytest.mark.long
@pytest.mark.parametrize("name", DDP)
def test_fsdp_is_ddp(runs: dict[str, Runs], name: str) -> None:
    ddp, fsdp = runs["ddp"][name][0], runs["fsdp"][name][0]
    assert_close(ddp, fsdp, atol=1e-5)
    moved = max(float((x - ddp["teacher"][n]).abs().max()) for n, x in ddp["student"].items())
    assert moved > 1e-3  # what is compared has moved by more than what is allowed


@pytest.mark.long
@pytest.mark.parametrize("name", FSDP)
def test_ranks_of_fsdp_agree_and_hold_half_each(runs: dict[str, Runs], name: str) -> None:
    one, other = runs["fsdp"][name]
    assert_close(one, other, atol=0)
    whole = sum(x.numel() for x in one["student"].values())
    assert one["held"] + other["held"] == whole
    assert abs(one["held"] - other["held"]) < 0.1 * whole
    assert runs["ddp"][name][0]["held"] == whole


@pytest.mark.long
@pytest.mark.parametrize("name", AGAIN)
def test_blocks_that_are_computed_again_change_no_bit(runs: dict[str, Runs], name: str) -> None:
    strategy = AGAIN[name][1]
    assert_close(runs["again"][name][0], runs[strategy][name][0], atol=0)


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
