"""The installed Ray has what we use of its private parts, and says in one sentence what is gone."""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import services, utils
from ray.data import DataContext
from ray.data._internal.execution import backpressure_policy
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ScalingPolicy
from ray.train.v2.api.exceptions import WorkerGroupError

from pipeline.driver import data_internals, ray_internals
from pipeline.errors import PipelineError

ROOT = Path(__file__).resolve().parents[2]


class Rules:
    largest = 8

    def __init__(self) -> None:
        self.size: int | None = None
        self.at: list[str] = []

    def next_group(self) -> int | None:
        return self.size

    def other_group(self, at: list[str]) -> int | None:
        self.at = at
        return self.size


def policies(
    monkeypatch: pytest.MonkeyPatch, rules: Rules, saved: Callable[[], int]
) -> tuple[Any, Any]:
    """The scaling and the failure policy that Ray Train would be given."""
    parts: dict[str, Any] = {}
    keep = "_initialize_and_run_controller"
    monkeypatch.setattr(TorchTrainer, keep, lambda self, **options: parts.update(options))
    monkeypatch.setattr(ScalingPolicy, "_maybe_send_resource_request", lambda self: None)
    one = ray_internals.trainer(
        lambda: None,
        rules,
        saved,
        scaling_config=ScalingConfig(num_workers=8, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=2)),
    )
    one._initialize_and_run_controller(scaling_policy="Ray's own", failure_policy="Ray's own")
    return parts["scaling_policy"], parts["failure_policy"]


def test_sizes_of_groups_are_those_of_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules()
    policy, _ = policies(monkeypatch, rules, lambda: 0)
    assert policy._get_num_workers_for_resource_request() == 8
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    rules.size = 4
    decision = policy.make_decision_for_non_running_worker_group()
    assert (decision.num_workers, decision.resources_per_worker["CPU"]) == (4, 0.5)
    worker = type("Worker", (), {"metadata": type("Metadata", (), {"node_id": "a"})})
    group = type("Group", (), {"workers": [worker, worker]})
    decision = policy.make_decision_for_running_worker_group(  # by name, as Ray Train calls it
        worker_group_state=group, worker_group_status=None
    )
    assert decision.num_workers == 4
    assert rules.at == ["a", "a"]


def test_failures_are_counted_between_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = 0
    _, restarts = policies(monkeypatch, Rules(), lambda: newest)
    error = WorkerGroupError("a worker died", {0: RuntimeError("x")})
    for newest in (5, 10, 15, 20):  # noqa: B007  (the policy reads it)
        assert restarts.make_decision(training_failed_error=error) == FailureDecision.RETRY
    assert restarts.make_decision(training_failed_error=error) == FailureDecision.RETRY
    assert restarts.make_decision(training_failed_error=error) == FailureDecision.RAISE


def start_ray() -> None:
    with ray_internals.own_process_group() as processes, ray_internals.raylet_watched(processes):
        pass


def handle_sigterm() -> None:
    with ray_internals.own_sigterm():
        pass


def train() -> None:
    configs = {
        "scaling_config": ScalingConfig(num_workers=1),
        "run_config": RunConfig(failure_config=FailureConfig()),
    }
    ray_internals.trainer(lambda: None, Rules(), lambda: 0, **configs)


GONE: list[tuple[Any, str, Callable[[], object]]] = [
    (services, "get_node", start_ray),
    (services, "ConsolePopen", start_ray),
    (utils, "detect_fate_sharing_support", start_ray),
    (utils, "set_sigterm_handler", handle_sigterm),
    (ray._private.state.state, "get_draining_nodes", ray_internals.draining_nodes),
    (ray._raylet, "GcsClient", lambda: ray_internals.gcs_client("127.0.0.1:1")),
    (TorchTrainer, "_initialize_and_run_controller", train),
    (TorchTrainer, "_register_sigint_handler", train),
    (ScalingPolicy, "_get_num_workers_for_resource_request", train),
    (
        backpressure_policy.DownstreamCapacityBackpressurePolicy,
        "_get_output_pressure",
        lambda: data_internals.pace_data(DataContext(), 1.0, 4),
    ),
    (
        type("Split", (), {"_coord_actor": None}),
        "_coord_actor",
        lambda: data_internals.end_split([1]),
    ),
]


def test_what_a_ray_lacks_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is taken away in turn; a hook that is gone would else never be called."""
    for owner, name, use in GONE:
        with monkeypatch.context() as patch:
            of = next((c for c in getattr(owner, "__mro__", ()) if name in vars(c)), owner)
            if of is owner or isinstance(of, type):
                patch.delattr(of, name) if name in vars(of) else patch.delattr(type(of), name)
            with pytest.raises(PipelineError) as caught:
                use()
        assert f"Ray {ray.__version__} is not as expected: " in caught.value.what, name
        assert name in caught.value.what and "it is needed" in caught.value.what
        assert "pip install 'ray[data,train,default]>=" in caught.value.hint


def test_another_release_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pipeline"):
        ray_internals.check_version()
        assert not caplog.text
        monkeypatch.setattr(ray, "__version__", "99.1.0rc1")
        ray_internals.check_version()
    assert "this is Ray 99.1.0rc1; install one that it was written for" in caplog.text


def test_the_releases_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (line,) = [d for d in project["dependencies"] if d.startswith("ray[")]
    assert ray_internals._wanted().endswith(f"'{line}'")
    private = re.compile(r"\bray(\.\w+)*\._(private|internal|raylet)")
    known = "ray_internals.py", "data_internals.py"
    others = [p for p in (ROOT / "pipeline").rglob("*.py") if p.name not in known]
    assert not [path.name for path in others if private.search(path.read_text())]
