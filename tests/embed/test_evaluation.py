"""Evaluation by vectors of the embed stage, against that of the network in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config.load import load
from pipeline.evaluate.teacher import EvaluationSpec, Evaluator
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan
from pipeline.stages import evaluate
from pipeline.storage.run_folder import RunFolder
from pipeline.train import build, state
from pipeline.train.run import evaluation_spec, plan_for
from pipeline.train.start import starting_pair
from tests.evaluate.test_teacher import NAMES, colours, picture
from tests.tiny import write_tiny


@pytest.fixture
def trained(tmp_path: Path) -> tuple[state.Saved, EvaluationSpec, Plan]:
    """A run whose teacher is not its first network, and labelled sets in two orders."""
    import numpy as np

    rng = np.random.default_rng(5)
    each = [(NAMES[i % 3], picture(rng, i % 3)) for i in range(90)]
    shards = colours(tmp_path / "reference", [*each[:60], ("red", b"broken")], NAMES)
    colours(tmp_path / "queries", each[60:], NAMES[::-1])
    path = write_tiny(tmp_path / "tiny.yaml", evaluate={"queries": f"{tmp_path}/queries", "k": 5})
    config = load([str(path), f"data.shards={tmp_path}/reference"])
    plan = plan_for(config, shards, Machine(cpus=2, gpus=0, bfloat16=False))
    teacher = build.pair(config).teacher
    with torch.no_grad():
        for value in teacher.backbone.parameters():
            value.add_(0.1 * torch.randn_like(value))
    meta = {"plan": plan.model_dump(mode="json")}
    tensors = {"teacher": teacher.state_dict()}
    saved = state.save(tmp_path / "runs" / "tiny" / "checkpoints", 5, tensors, meta)
    return saved, evaluation_spec(plan, shards), plan


@pytest.mark.long
@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("half", [False, True])
def test_scores_are_those_of_the_network_in_memory(
    trained: tuple[state.Saved, EvaluationSpec, Plan], tmp_path: Path, half: bool
) -> None:
    saved, spec, plan = trained
    spec = replace(spec, half=half)
    context = SimpleNamespace(folder=RunFolder.of(f"{tmp_path}/runs", "tiny"))
    tables = evaluate._tables(context, saved, spec)  # type: ignore[arg-type]
    assert [tables["trained"][name].rows for name in ("reference", "queries")] == [60, 30]
    results, pictures = evaluate._evaluate(spec, str(saved.path), "cpu", tables)
    networks = {
        "trained": evaluate.teacher(saved).backbone,
        "step0": starting_pair(plan)[0].teacher.backbone,
    }
    for name, network in networks.items():
        expected = Evaluator(spec).run(network)
        for metric, value in expected.metrics.items():
            assert results[name][metric] == pytest.approx(value, rel=1e-2 if half else 1e-4), (
                name,
                metric,
            )
    assert set(pictures) == {"neighbours", "patch_pca"} == set(expected.pictures)
    assert results["trained"] != results["step0"]
    assert results["raw_pixels"] == {"eval/knn5_top1": Evaluator(spec).raw_pixels()}
    assert evaluate._tables(context, saved, spec) == tables  # type: ignore[arg-type]
