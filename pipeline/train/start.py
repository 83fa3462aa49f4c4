"""What a run starts from: random weights, given ones, or a checkpoint; and its frozen teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.config import Config
from pipeline.errors import PipelineError
from pipeline.images.value_range import FULL, ValueRange, shown
from pipeline.model.fit import Weights, fit
from pipeline.model.foreign import ForeignBackbone, timm_by_name
from pipeline.model.foreign_weights import fit_foreign, read_safetensors
from pipeline.model.groups import parameter_groups
from pipeline.model.pair import Encoder, Pair, freeze, pair_of
from pipeline.model.weights import read_weights
from pipeline.plan.plan import Plan
from pipeline.plan.resume import plan_of
from pipeline.train import build
from pipeline.train.build import pair
from pipeline.train.checkpoint import state
from pipeline.train.checkpoint.files import step_of
from pipeline.train.checkpoint.names import divided, optimizer_state, prepare_optimizer
from pipeline.train.checkpoint.restore import put
from pipeline.train.distil.choice import chosen, normalisation
from pipeline.train.distil.features import attach
from pipeline.train.distil.source import Source
from pipeline.train.encoders.kept import encoder_files, say_copy
from pipeline.train.objective import Objective
from pipeline.train.parallel.strategy import Layout, prepare
from pipeline.train.tune.choose import frozen_names, take_frozen, tuned
from pipeline.uri import is_uri, join, parent, public

TIMM = "timm:"  # before the name of a model whose weights timm has
# of a plan: what a run looks up when it begins, and keeps
KEPT = (
    *("init", "encoder_files"),
    *("frozen_teacher", "teacher_digest", "distil_loss", "distil_reason"),
)


@dataclass
class TrainState:
    """What training changes and a checkpoint holds, on its device."""

    pair: Pair
    objective: Objective
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        """Nested dicts of tensors, for a checkpoint: the live ones, slices where they are split.
        What is frozen is there once, with the teacher.
        """
        frozen = frozen_names(self.pair.student)
        return {
            "student": {
                name: x for name, x in self.pair.student.state_dict().items() if name not in frozen
            },
            "teacher": self.pair.teacher.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
        }

    def live(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors that a checkpoint of these names fills in place; the optimizer's are made
        where its first step has not made them yet.
        """
        paths = [name.split("/") for name in names]
        learnt = {path[1] for path in paths if path[0] == "optimizer"}
        prepare_optimizer(self.optimizer, learnt)
        state = self.state()
        del state["objective"]  # its tensors come and go from step to step
        return divided(state)[0]

    def take(self, state: dict[str, Any]) -> None:
        """The rest of a checkpoint."""
        self.objective.load_state_dict(state["objective"])
        take_frozen(self.pair)

    def restore(self, state: dict[str, Any]) -> None:
        """Puts a whole state in place, as `Saved.load` gives it; in one process."""
        tensors = divided(state)[0]
        for name, target in self.live(tensors).items():
            put(target, tensors[name])
        self.take(state)


def networks(plan: Plan, resumed: bool, source: Source | None = None) -> Pair:
    """The networks that a `located` plan begins with, on the CPU and equal on all workers. A run
    that is `resumed` no longer needs the weights it started from, and restores its own next. The
    `source` is that of a teacher whose features are learnt.
    """
    built = random_pair(plan) if resumed else starting_pair(plan)[0]
    return with_frozen_teacher(tuned(built, plan.config), plan, source)


def random_pair(plan: Plan) -> Pair:
    """The networks of a plan with random weights, without heads where it needs none."""
    return pair(plan.config, plan.encoder_files, not plan.headless)


def train_state(plan: Plan, built: Pair, layout: Layout, resumed: bool) -> TrainState:
    """What is trained, from `networks`, which are brought into the form of the layout in place."""
    features = build.feature_spec(plan) if plan.learns_features else None
    objective = build.objective(plan.config, built, features)
    if not resumed:
        carry_centres(objective, built, plan)
    prepare(built, layout)
    optim = plan.config.optim
    groups = parameter_groups(built.student, optim.layerwise_decay, optim.patch_embed_lr)
    # Fused: one pass over memory on a CPU (a quarter of the time), one start on a GPU.
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, fused=True)
    return TrainState(built, objective, optimizer)


def located(plan: Plan, saved: state.Saved | None) -> Plan:
    """The plan with the very checkpoints that `model.init` and `distill.teacher` mean, and with the
    text of `model.encoder=module:…`.

    Looked up once, when the run begins: a run folder goes on changing, and all workers and all
    restarts must use the same weights. A run that goes on, from `saved`, keeps what it began with.

    Raises:
        PipelineError: there is no such module.
    """
    if saved is not None:
        earlier = plan_of(saved.meta, saved.path)
        update = {name: getattr(earlier, name) for name in KEPT}
        if earlier.frozen_teacher and not earlier.distil_loss:  # of a version with targets alone
            update["distil_loss"] = "targets"
        return plan.model_copy(update=update)

    config = plan.config
    init, teacher = (
        checkpoint_at(path) if path else None
        for path in (config.model.init, config.distill.teacher)
    )
    trained = plan_of(teacher.meta, teacher.path) if teacher else None
    learnt, reason = chosen(config, trained)
    return plan.model_copy(
        update={
            "init": str(init.path) if init else config.model.init,
            "frozen_teacher": str(teacher.path) if teacher else config.distill.teacher,
            "distil_loss": learnt,
            "distil_reason": reason,
            "encoder_files": encoder_files(config),
        }
    )


def starting_pair(plan: Plan) -> tuple[Pair, str]:
    """The pair at step 0, random or with the weights of a `located` plan, and a line on them.

    Weights of a run of ours come with its heads, from its teacher, for student and teacher alike;
    heads of another shape, and all heads for other weights, stay random.

    Raises:
        PipelineError: the weights are not there or do not fit, with all that is wrong.
    """
    config, source = plan.config, plan.init
    built = random_pair(plan)
    if not source:
        return built, "random weights"
    student = built.student
    network, resize = student.backbone, config.model.init_resize
    if source.startswith(TIMM) and isinstance(network, ForeignBackbone):
        named = timm_by_name(source.removeprefix(TIMM), pretrained=True)
        text = fit_foreign(network, named.state_dict(), source, resize)
        return pair_of(student), f"{source} ({text}), heads are new"
    saved = checkpoint_at(source)
    if saved is None and is_uri(source):
        raise PipelineError(
            f"model.init={public(source)} holds no checkpoint of ours",
            "at a URI, name a run folder or a folder checkpoints/step-…; download other weights",
        )
    if saved is None:
        if isinstance(network, ForeignBackbone):
            text = fit_foreign(network, read_safetensors(source), source, resize)
        else:
            weights = read_weights(source)
            fit(network, weights, source, resize)
            text = f"{weights.origin}{weights.note and f', {weights.note}'}"
        return pair_of(student), f"{source} ({text}), heads are new"
    teacher = saved.teacher()
    tensors = part_of(teacher, "backbone")
    if isinstance(network, ForeignBackbone):
        fit_foreign(network, tensors, str(saved.path), resize)
    else:
        fit(network, Weights(tensors, "checkpoint"), str(saved.path), resize)
    kept: list[str] = []
    fresh: list[str] = []
    dropped = ""
    for name in ("dino_head", "ibot_head"):
        head, head_tensors = getattr(student, name), part_of(teacher, name)
        if head is None:
            dropped = f"; its {name} is left out" if head_tensors else ""
            continue
        shapes = {k: v.shape for k, v in head.state_dict().items()}
        fits = shapes == {k: v.shape for k, v in head_tensors.items()}
        if fits:
            kept.append(name)
            head.load_state_dict(head_tensors)
        else:
            fresh.append(f"{name} of another shape, new" if head_tensors else f"{name} new")
    heads = f"with {' and '.join(kept)}" if kept else "without heads"
    new = f"; {' and '.join(fresh)}" if fresh else ""
    return pair_of(student), f"{public(saved.path)}, {heads}{new}{dropped}"


def carry_centres(objective: Objective, pair: Pair, plan: Plan) -> None:
    """Begin with the centres of the checkpoint whose heads make the targets: those of the frozen
    teacher, else of `model.init`. Trained heads need them from the first step on; the centre of a
    head that is new stays 0.
    """
    source = plan.init if plan.learns_features else plan.frozen_teacher or plan.init
    saved = checkpoint_at(source) if source and not plan.headless else None
    if saved is None or plan_of(saved.meta, saved.path).headless:
        return
    source_state, own = saved.load("teacher", "objective"), objective.state_dict()
    tensors, centres = source_state["teacher"], source_state["objective"]
    maker = pair.target_maker
    for term in ("dino", "ibot"):
        # the head that scores this term, here and there: iBOT may have one of its own
        theirs = "ibot_head" if term == "ibot" and part_of(tensors, "ibot_head") else "dino_head"
        ours = "ibot_head" if term == "ibot" and maker.ibot_head is not None else "dino_head"
        head = part_of(tensors, theirs)
        own_head = getattr(maker, ours).state_dict()
        if theirs == ours and all(
            name in head and torch.equal(x.cpu(), head[name]) for name, x in own_head.items()
        ):
            own[term] = centres[term]
    objective.load_state_dict(own)


def part_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one child of an encoder (`backbone`, `dino_head` …), by its own names."""
    return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}


def checkpoint_at(path: str) -> state.Saved | None:
    """The checkpoint that a run folder (the best one, else the last) or a checkpoint's path means;
    None where the path is neither.
    """
    if not is_uri(path) and Path(path).is_file():
        return None  # weights
    place = path if is_uri(path) else Path(path)
    if step_of(parent(place)[1]) is not None and (saved := state.at(place)):
        return saved
    best = state.best(join(place, "checkpoints"))
    return best[0] if best else state.latest(join(place, "checkpoints"))


def encoder_of(saved: state.Saved) -> tuple[Encoder, Config]:
    """The teacher of a checkpoint, with heads where it has some, and the recipe it was trained
    with. An encoder of a module is made from the text that the checkpoint holds.

    Raises:
        PipelineError: this machine runs no code of others, see `from_copy`.
    """
    plan = plan_of(saved.meta, saved.path)
    say_copy(plan, saved)
    encoder = random_pair(plan).teacher
    tensors = saved.teacher()
    encoder.load_state_dict({k: x for k, x in tensors.items() if not k.startswith("adapter.")})
    return encoder, plan.config


def with_frozen_teacher(built: Pair, plan: Plan, source: Source | None = None) -> Pair:
    """The pair with the frozen teacher of a `located` plan, where there is one.

    Args:
        built: student and teacher; without heads where features alone are learnt.
        plan: located.
        source: opens the teacher, where its features are learnt.

    Raises:
        PipelineError: no checkpoint there, targets that do not fit the student's heads, or a
            network that does not fit the student's images.
    """
    config, place = plan.config, plan.frozen_teacher
    if not place:
        return built
    if plan.learns_features:
        assert source is not None
        check_range(plan, source.value_range, source.trained)
        mean, std, _ = normalisation(config)
        teacher = source.open(mean, std, plan.device, plan.threads)
        return attach(built, teacher, build.feature_spec(plan), config.run.seed)
    saved = checkpoint_at(place)
    if saved is None:
        raise PipelineError(
            f"distill.teacher={public(place)} holds no checkpoint of ours, and "
            "distill.loss=targets needs its heads",
            "name a run folder (runs/<name>) or a folder checkpoints/step-…; exported and released "
            "weights have no heads: learn their features with distill.loss=cosine",
        )
    encoder, theirs = encoder_of(saved)
    check_range(plan, Plan.model_validate(saved.meta["plan"]).value_range or FULL, True)
    untrained = [
        name
        for name in ("dino_weight", "ibot_weight")
        if getattr(config.loss, name) and not getattr(theirs.loss, name)
    ]
    if untrained:
        raise PipelineError(
            f"the frozen teacher was trained with loss.{untrained[0]}=0: its targets mean nothing",
            f"set loss.{untrained[0]}=0 here too",
        )
    seen, ours = normalisation(theirs), normalisation(config)
    if seen != ours:
        raise PipelineError(
            f"the frozen teacher was trained with mean, std, channels {seen}, "
            f"the student has {ours}",
            "set augment.mean, augment.std and model.in_channels as they were for the teacher",
        )
    built.frozen = freeze(encoder, built.student)
    return built


def check_range(plan: Plan, was: ValueRange, trained: bool) -> None:
    """Refuses a teacher that saw other values of deep images than the student will.

    Args:
        plan: of the student.
        was: range of values that became 0 to 255 for the teacher.
        trained: whether it is known; released weights, which know of 8 bits alone, take any.

    Raises:
        PipelineError: the two differ.
    """
    ours = plan.value_range or FULL
    if was != ours and (trained or was != FULL):
        raise PipelineError(
            f"the frozen teacher was trained with data.range={shown(was)}, the student's images "
            f"are read with {shown(ours)}",
            f"set data.range={shown(was)}",
        )
