"""Who is on a card: the models that were asked for, and the networks that they began as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.card.card import Role
from pipeline.embed.beginnings import (
    at_step_0,
    checkpoint_of,
    computes_in_half,
    passes_over,
    start_of,
    trained_on,
    untrained,
)
from pipeline.embed.embedders import EmbedderSpec, embedder_of
from pipeline.errors import ConfigError, PipelineError, StorageError
from pipeline.uri import is_uri, parent, public


@dataclass(frozen=True)
class Network:
    """One network whose vectors are scored; small, sent to tasks.

    Attributes:
        role: `model`, or which baseline.
        name: for people.
        of: the name of the model that a baseline belongs to, else "".
        spec: how it is opened.
        step: of the checkpoint; 0 before training; None for other weights.
        images: that it was trained on; 0: that is not known.
        passes: over these images; 0: that is not known.
        start: the weights that its training began with; "": random ones, or that is not known.
        best_of: evaluations of its training, on these images, that it was chosen from.
    """

    role: Role
    name: str
    of: str
    spec: EmbedderSpec
    step: int | None = None
    images: int = 0
    start: str = ""
    passes: float = 0.0
    best_of: int = 1

    @property
    def identity(self) -> list[Any]:
        """Changes with the network, the images that it sees, and what it was chosen from."""
        chosen = [self.best_of] if self.best_of > 1 else []
        return [self.role, self.name, self.spec.settings, *chosen]


@dataclass(frozen=True)
class Opening:
    """How models are opened.

    Attributes:
        image_size: side of the images, pixels; None: the models' own.
        batch_size: images embedded at once.
        mean: of each channel, where a model does not say its own.
        std: likewise.
        runs: the folder in which runs are looked for by their names.
    """

    image_size: int | None
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    runs: str


def networks_of(models: Sequence[str], opening: Opening) -> list[Network]:
    """The models, each followed by what it began as: of weights by the same network with random
    ones, where what it is made of is known.

    Raises:
        PipelineError: there is no such model, or two names mean the same one.
    """
    networks: list[Network] = []
    digests: dict[str, str] = {}
    for model, shown in zip(models, short_names(models), strict=True):
        spec = _opened(model, opening)
        if spec.key in digests:
            raise ConfigError(
                f"evaluate.models names one model twice: {digests[spec.key]} and {model}",
                "name each model once",
            )
        digests[spec.key] = model
        networks += _with_beginnings(shown, spec)
    return networks


def _opened(model: str, opening: Opening) -> EmbedderSpec:
    try:
        return embedder_of(
            model,
            image_size=opening.image_size,
            batch_size=opening.batch_size,
            mean=opening.mean,
            std=opening.std,
            folder=opening.runs,
        )
    except StorageError:
        raise
    except PipelineError as error:  # several models may be named
        raise ConfigError(f"evaluate.models: {error.what}", error.hint) from error


def short_names(models: Sequence[str]) -> list[str]:
    """What models are called on a card: `runs/photos` of a long path, a checkpoint by its run; more
    of the path where two would be called alike.
    """
    places = [_run_of(model) for model in models]
    places = [one.partition("?")[0] if is_uri(one) else one for one in places]
    parts = [public(one).rstrip("/").split("/") for one in places]
    for count in range(2, max(map(len, parts), default=2) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(set(map(tuple, parts))):
            return names
    return ["/".join(one) for one in parts]


def _run_of(model: str) -> str:
    """The folder of the run, of a checkpoint."""
    folder, name = parent(model)
    above, where = parent(folder)
    return str(above) if name.startswith("step-") and where == "checkpoints" else model


def _with_beginnings(shown: str, spec: EmbedderSpec) -> list[Network]:
    checkpoint = checkpoint_of(spec)
    if not checkpoint:
        model = Network("model", shown, "", spec)
        random = untrained(spec)
        if random is None:
            return [model]
        return [model, Network("untrained", f"{shown} untrained", shown, random, 0)]
    spec = replace(spec, half=computes_in_half(checkpoint))
    step = int(parent(checkpoint)[1].partition("-")[2])
    name = f"{shown} (step {step:,})"
    start = start_of(checkpoint)
    images, passes = trained_on(checkpoint), passes_over(checkpoint)
    trained = Network("model", name, "", spec, step, images, start, passes)
    if not start:
        return [trained, Network("step0", f"{name} at step 0", name, at_step_0(spec), 0)]
    began = Network("init", public(start), name, at_step_0(spec))
    fresh = Network("untrained", f"{name} untrained", name, at_step_0(spec, untrained=True), 0)
    return [trained, began, fresh]
