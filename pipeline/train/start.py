"""What a run starts from: random weights, given ones, or a checkpoint; and its frozen teacher."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config
from pipeline.errors import PipelineError
from pipeline.model.fit import Weights, fit
from pipeline.model.foreign import ForeignBackbone, fit_foreign, read_safetensors
from pipeline.model.pair import Encoder, Pair, freeze, pair_of
from pipeline.model.weights import read_weights
from pipeline.plan import Plan
from pipeline.train import state
from pipeline.train.build import pair


def starting_pair(config: Config) -> tuple[Pair, str]:
    """The pair at step 0, random or with the weights that `model.init` names, and a line on them.

    Weights of a run of ours come with its heads, from its teacher, for student and teacher alike;
    heads of another shape, and all heads for other weights, stay random.

    Raises:
        PipelineError: the weights are not there or do not fit, with all that is wrong.
    """
    built = pair(config)
    source = config.model.init
    if not source:
        return built, "random weights"
    student = built.student
    network, resize = student.backbone, config.model.init_resize
    saved = checkpoint_at(source)
    if saved is None:
        if isinstance(network, ForeignBackbone):
            text = fit_foreign(network, read_safetensors(source), source)
        else:
            weights = read_weights(source)
            fit(network, weights, source, resize)
            text = f"{weights.origin}{weights.note and f', {weights.note}'}"
        return pair_of(student), f"{source} ({text}), heads are new"
    held = saved.load()["teacher"]
    tensors = {k.removeprefix("backbone."): v for k, v in held.items() if k.startswith("backbone.")}
    if isinstance(network, ForeignBackbone):
        fit_foreign(network, tensors, str(saved.path))
    else:
        fit(network, Weights(tensors, "checkpoint"), str(saved.path), resize)
    kept: list[str] = []
    fresh: list[str] = []
    for name in ("dino_head", "ibot_head"):
        head = getattr(student, name)
        if head is None:
            continue
        found = {k.removeprefix(f"{name}."): v for k, v in held.items() if k.startswith(f"{name}.")}
        shapes = {k: v.shape for k, v in head.state_dict().items()}
        fits = shapes == {k: v.shape for k, v in found.items()}
        (kept if fits else fresh).append(name)
        if fits:
            head.load_state_dict(found)
    heads = f"with {' and '.join(kept)}" if kept else "without heads"
    new = f"; {' and '.join(fresh)} of another shape, new" if fresh else ""
    return pair_of(student), f"{saved.path}, {heads}{new}"


def checkpoint_at(path: str) -> state.Saved | None:
    """The checkpoint that a run folder (the best one, else the last) or a checkpoint's path means;
    None where the path is neither.
    """
    folder = Path(path)
    if (folder / "meta.json").is_file():
        return next((s for s in state.checkpoints(folder.parent) if s.path == folder), None)
    best = state.best(folder / "checkpoints")
    return best[0] if best else state.latest(folder / "checkpoints")


def encoder_of(saved: state.Saved) -> tuple[Encoder, Config]:
    """The teacher of a checkpoint, heads included, and the recipe it was trained with."""
    config = Plan.model_validate(saved.meta["plan"]).config
    encoder = pair(config).teacher
    encoder.load_state_dict(saved.load()["teacher"])
    return encoder, config


def with_frozen_teacher(built: Pair, config: Config) -> Pair:
    """The pair with the frozen teacher of `distill.teacher`, where there is one.

    Raises:
        PipelineError: no checkpoint there, or targets that do not fit the student's heads.
    """
    source = config.distill.teacher
    if not source:
        return built
    saved = checkpoint_at(source)
    if saved is None:
        raise PipelineError(
            f"distill.teacher={source} holds no checkpoint of ours",
            "name a run folder (runs/<name>) or a folder checkpoints/step-…; exported weights have "
            "no heads, and without heads there are no targets",
        )
    encoder, theirs = encoder_of(saved)
    seen, ours = ((c.augment.mean, c.augment.std, c.model.in_channels) for c in (theirs, config))
    if seen != ours:
        raise PipelineError(
            f"the frozen teacher was trained with mean, std, channels {seen}, "
            f"the student has {ours}",
            "set augment.mean, augment.std and model.in_channels as they were for the teacher",
        )
    built.frozen = freeze(encoder, built.student)
    return built
