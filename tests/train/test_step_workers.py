"""The step on two workers: real processes, gloo and DDP, started once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from pipeline.loss.centre import Centre
from pipeline.loss.target import sinkhorn_targets
from pipeline.schedule import StepValues
from pipeline.train.step import NonFinite, ObjectiveSpec, train_step
from pipeline.views.batch import Views
from tests.train.reference import (
    SHARED,
    flat,
    golden_objective,
    golden_optimizer,
    golden_pair,
    golden_views,
    logged,
)
from tests.train.small_run import OTHER_HEAD, Run, assert_same, poison_view, split, views

FILES = ["A_shared_centering", "B_separate_sinkhorn"]


def whole_batch() -> Views:
    whole = views(8)
    whole.masks[:] = False
    whole.masks[:, 2] = True  # equal counts, so that a mean of means is the mean
    return whole


def small_runs(rank: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for centring in ("softmax", "sinkhorn"):
        run = Run(ObjectiveSpec(koleo_weight=0.0, centring=centring), OTHER_HEAD)
        student = DistributedDataParallel(run.pair.student)
        mine = split(whole_batch(), 4)[2 * rank : 2 * rank + 2]
        for it in range(2):
            result = run.step(*mine, forward=student, stop=rank == 1 and it == 1)
            out[f"{centring}_stop_{it}"] = result.stop
        out[centring] = run.weights()
        out[f"{centring}_scalars"] = result.scalars
    before = run.weights()
    bad = views(2)
    if rank == 1:
        poison_view(bad)
    with pytest.raises(NonFinite) as error:
        run.step(bad, forward=student)
    out["names"] = error.value.names
    assert_same(run.weights(), before, atol=0)
    # A worker without masked patches must neither hang nor change the others' law.
    run.step(views(2, masked=rank == 0), forward=student)
    out["uneven"] = run.weights()
    mine = of_bad_images(views(3, seed=1)) if rank else views(3)
    for centring in ("softmax", "sinkhorn"):
        out[f"{centring}_bad"] = one_step(centring, mine, 2)
    # Terms of weight 0 and heads without rows must not leave DDP waiting.
    for absent in ("dino", "ibot", "koleo"):
        for head in (None, OTHER_HEAD):
            run = Run(replace(ObjectiveSpec(), **{f"{absent}_weight": 0.0}), head)
            student = DistributedDataParallel(run.pair.student)
            for seed in range(2):
                run.step(views(2, seed, local_crops=0), views(2, seed + 9), forward=student)
    return out


def one_step(centring: Any, batch: Views, workers: int) -> dict[str, Any]:
    """Scalars, gradients and centres of a step, not clipped."""
    run = Run(ObjectiveSpec(centring=centring, clip=1e9), OTHER_HEAD)
    student = run.pair.student
    forward = DistributedDataParallel(student) if workers > 1 else student
    scalars = run.step(batch, forward=forward).scalars
    return {
        "averaged": scalars | {name: p.grad for name, p in student.named_parameters()},
        "dino_centre": run.objective.dino_centre.use(),
        "ibot_centre": run.objective.ibot_centre.use(),
    }


def of_bad_images(batch: Views) -> Views:
    nothing = torch.zeros(batch.images)
    return replace(batch, masks=torch.zeros_like(batch.masks), weights=nothing)


def golden_steps(rank: int) -> dict[str, Any]:
    golden = torch.load(SHARED / "golden" / "dist" / "two_ranks.pt", weights_only=True)
    mine, out = golden["ranks"][rank], {}
    for head in ("dino", "ibot"):
        logits = mine[f"{head}_teacher_logits"]
        out[f"{head}_sinkhorn"] = sinkhorn_targets([logits], 0.05)[0].probabilities()
        centre = Centre(logits.shape[1])
        centre.see([logits])
        out[f"{head}_centre"] = centre.use()
    for name in FILES:
        step = mine[name]
        init = torch.load(SHARED / "golden" / "step" / f"{name}.pt", weights_only=True)
        pair = golden_pair(init)
        objective = golden_objective(init, pair)
        # No clipping and no update, so that the averaged gradients can be read afterwards.
        objective.spec = replace(objective.spec, clip=1e9)
        batch = golden_views(step["batch_seed"])
        assert torch.equal(batch.masks, step["masks"])
        result = train_step(
            DistributedDataParallel(pair.student),
            pair,
            [batch],
            golden_optimizer(init, pair.student),
            StepValues(0.0, 0.0, 1.0, step["teacher_temp"], 0.0),
            objective,
        )
        out[name] = {
            "scalars": result.scalars,
            "norms": {n: float(p.grad.norm()) for n, p in pair.student.named_parameters()},
            "dino_centre": objective.dino_centre.use(),
            "ibot_centre": objective.ibot_centre.use(),
        }
    return out


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Meeting over a file: a free port may be taken by the time it is used.
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    try:
        out = {"small": small_runs(rank)}
        if SHARED.is_dir():
            out["golden"] = golden_steps(rank)
        torch.save(out, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    yield [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.long
@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_two_workers_with_accumulation_are_one_with_the_whole_batch(
    ranks: list[dict[str, Any]], centring: Any
) -> None:
    a, b = (each["small"] for each in ranks)
    assert_same(a[centring], b[centring], atol=0)
    run = Run(ObjectiveSpec(koleo_weight=0.0, centring=centring), OTHER_HEAD)
    for _ in range(2):
        alone = run.step(whole_batch()).scalars
    assert_same(a[centring], run.weights(), atol=2e-5)
    for name, x in alone.items():
        if name != "health/prototypes_used":  # counted a micro batch
            ours = a[f"{centring}_scalars"][name]
            torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_a_worker_of_bad_images_alone_adds_nothing(
    ranks: list[dict[str, Any]], centring: Any
) -> None:
    """Centres and targets are those of the other worker alone. Losses and gradients are means over
    the workers: half of its own.
    """
    alone = one_step(centring, views(3), 1)
    for each in ranks:
        ours = each["small"][f"{centring}_bad"]
        for name, x in alone["averaged"].items():
            torch.testing.assert_close(
                2 * ours["averaged"][name],
                x,
                rtol=1e-4,
                atol=1e-6,
                msg=lambda m, n=name: f"{n} {m}",
            )
        for head in ("dino_centre", "ibot_centre"):
            torch.testing.assert_close(ours[head], alone[head], rtol=1e-6, atol=1e-7)
            assert alone[head].any() == (centring == "softmax")


@pytest.mark.long
def test_workers_agree_to_stop_and_on_what_is_not_finite(ranks: list[dict[str, Any]]) -> None:
    a, b = (each["small"] for each in ranks)
    for each in (a, b):
        assert (each["softmax_stop_0"], each["softmax_stop_1"]) == (False, True)
    assert a["names"] == b["names"] and "loss/dino_local" in a["names"]
    assert_same(a["uneven"], b["uneven"], atol=0)


@pytest.mark.long
def test_targets_and_centres_are_the_references(shared: Path, ranks: list[dict[str, Any]]) -> None:
    golden = torch.load(shared / "golden" / "dist" / "two_ranks.pt", weights_only=True)
    for rank, mine in enumerate(golden["ranks"]):
        ours = ranks[rank]["golden"]
        for head in ("dino", "ibot"):
            torch.testing.assert_close(
                ours[f"{head}_sinkhorn"], mine[f"{head}_sinkhorn"], rtol=1e-4, atol=1e-6
            )
            expected = mine[f"{head}_center_after"].flatten()
            torch.testing.assert_close(ours[f"{head}_centre"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_the_step_is_the_references(shared: Path, ranks: list[dict[str, Any]], name: str) -> None:
    golden = torch.load(shared / "golden" / "dist" / "two_ranks.pt", weights_only=True)
    mine = [rank[name] for rank in golden["ranks"]]
    for rank in (0, 1):
        ours = ranks[rank]["golden"][name]
        for key, value in logged(mine[0]["loss_dict"]).items():
            mean = (value + logged(mine[1]["loss_dict"])[key]) / 2
            assert float(ours["scalars"][key]) == pytest.approx(mean, rel=2e-5), key
        for key, norm in flat(mine[rank]["grad_norm_mean"]).items():
            assert ours["norms"][key] == pytest.approx(norm, rel=2e-4, abs=1e-6), key
        if "centering" in name:
            for head in ("dino", "ibot"):
                expected = mine[rank][f"{head}_center_after"].flatten()
                torch.testing.assert_close(ours[f"{head}_centre"], expected, rtol=1e-4, atol=1e-6)
