"""Evaluations while training: asked for at a step, run by an actor, collected when they are there.

Training waits for none but in two places: the end of the run, and a request that finds two
unfinished ones before it, which waits for the older, so that teachers do not pile up in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import last_line, one_line
from pipeline.evaluate.health import alarm
from pipeline.evaluate.teacher import Evaluation, EvaluationSpec, Evaluator
from pipeline.model.foreign import TimmSpec
from pipeline.model.pair import Backbone
from pipeline.model.vit import BackboneSpec
from pipeline.plan.plan import Plan
from pipeline.train import build, state
from pipeline.uri import Place, join, public

log = logging.getLogger("pipeline.train")
MAX_PENDING = 2


class EvaluatorActor:
    """An `Evaluator` in a process of its own; weights come by value."""

    def __init__(
        self, spec: EvaluationSpec, backbone: BackboneSpec | TimmSpec, device: str
    ) -> None:
        self.evaluator = Evaluator(spec, device=device)
        self.backbone = backbone

    def run(self, weights: dict[str, torch.Tensor], limit: int | None) -> Evaluation:
        """Evaluates a teacher's backbone."""
        backbone = self.backbone.build()
        backbone.load_state_dict(weights)
        return self.evaluator.run(backbone, limit)


def launch_evaluator(spec: EvaluationSpec, plan: Plan) -> Any:
    """Starts the actor: on a GPU where one is free, else on CPUs beside the workers."""
    taken = plan.sizes[-1] * plan.gpus_per_worker
    gpus = ray.cluster_resources().get("GPU", 0) - taken if plan.device == "cuda" else 0
    device = "cuda" if gpus >= 1 else "cpu"
    options = {
        "num_cpus": 0,
        "num_gpus": 1 if gpus >= 1 else 0,
        "max_restarts": 3,
        "max_task_retries": 1,
    }
    if device == "cpu" and (node := roomiest(ray.nodes())):
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
    return (
        ray.remote(EvaluatorActor)
        .options(**options)
        .remote(spec, build.encoder_spec(plan.config), device)
    )


def roomiest(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Id of the living node with the most CPUs; empty where none has any.

    An actor that reserves nothing may be put anywhere, on a head without CPUs too, whose memory the
    whole cluster needs. Where the node is lost, the actor starts again on any other.

    Args:
        nodes: from `ray.nodes()`.
    """
    rooms = {n["NodeID"]: n["Resources"].get("CPU", 0) for n in nodes if n["Alive"]}
    best = max(rooms, key=lambda node: (rooms[node], node), default="")
    return best if best and rooms[best] > 0 else ""


class Evaluations:
    """Rank 0's side: requests, results, the best checkpoint and the collapse alarm.

    Args:
        plan: of the run.
        evaluator: the actor.
        tracker: takes metrics and pictures.
        folder: of the run.
        compared: which images and settings its scores are of, see `EvaluationSpec.key`.
    """

    def __init__(
        self, plan: Plan, evaluator: Any, tracker: Any, folder: Place, compared: str
    ) -> None:
        self.plan, self.evaluator, self.tracker = plan, evaluator, tracker
        self.compared = compared
        self.checkpoints = join(folder, "checkpoints")
        self.pending: list[tuple[int, Any]] = []
        self.newest: dict[str, float] = {}
        self.alarm_text = ""
        self.score_name = f"eval/knn{plan.config.evaluate.k}_top1"
        self.best: dict[str, float] | None = None
        if (best := state.best(self.checkpoints)) is not None:
            self.best = {"step": best[0].step, "score": best[1]}
            if state.best_compared(self.checkpoints) != compared:
                log.warning(
                    "the best checkpoint so far (step %d, score %.4f) was evaluated with other "
                    "images or settings (evaluate.*): the best is chosen anew from here on",
                    *self.best.values(),
                )
                self.best = None

    def request(self, step: int, backbone: Backbone) -> None:
        """Asks for an evaluation of the weights as they are now."""
        if len(self.pending) >= MAX_PENDING:
            ray.wait([self.pending[0][1]], timeout=None)
        self.collect()
        weights = {
            name: value.detach().cpu().clone() for name, value in backbone.state_dict().items()
        }
        limit = self.plan.config.evaluate.during_training
        self.pending.append((step, self.evaluator.run.remote(weights, limit)))

    def pending_steps(self) -> set[int]:
        """Steps whose checkpoints may yet turn out to be the best."""
        return {step for step, _ in self.pending}

    def note_step(self, metrics: dict[str, float]) -> None:
        """Keeps the step's health numbers for the alarm."""
        self.newest |= {k: v for k, v in metrics.items() if k.startswith("health/")}

    def collect(self, wait: bool = False, timeout: float | None = None) -> None:
        """Records the results that are there; with `wait`, all that come within `timeout` s."""
        while self.pending:
            step, reference = self.pending[0]
            ready, _ = ray.wait([reference], timeout=timeout if wait else 0)
            if not ready:
                return
            self.pending.pop(0)
            try:
                self._record(step, ray.get(reference))
            except ray.exceptions.RayError as error:
                # Training is worth more than one evaluation: said aloud, and the next one is tried.
                log.error("the evaluation of step %d failed: %s", step, last_line(error))

    def _record(self, step: int, evaluation: Evaluation) -> None:
        self.tracker.metrics(step, evaluation.metrics)
        for name, picture in evaluation.pictures.items():
            self.tracker.picture(name, step, picture)
        score = evaluation.metrics.get(self.score_name)
        shown = ", ".join(
            f"{name.partition('/')[2]} {v:.4g}" for name, v in evaluation.metrics.items()
        )
        log.info("evaluated   step %d: %s", step, shown)
        if score is not None:
            self.tracker.headline(step, {self.score_name: score})
            try:
                self._note_best(step, score)
            except OSError as error:
                place = public(join(self.checkpoints, "best.json"))
                log.error("%s could not be written (%s)", place, one_line(error))
        sentence = alarm(
            self.newest | evaluation.metrics,
            self.plan.config.head.prototypes,
            warming_up=step <= max(self.plan.warmup_steps, self.plan.temperature_warmup_steps),
        )
        # the numbers in a sentence change at each evaluation; what it is about is said once
        if sentence and sentence.split(" is ")[0] != self.alarm_text.split(" is ")[0]:
            log.warning("%s", sentence)
            self.tracker.tags({"alarm": sentence})
        self.alarm_text = sentence or ""

    def _note_best(self, step: int, score: float) -> None:
        known = {saved.step for saved in state.checkpoints(self.checkpoints)}
        if step in known and (self.best is None or score >= self.best["score"]):
            self.best = {"step": step, "score": score}
            state.mark_best(self.checkpoints, step, score, self.compared)
