"""The whole chain as one call: what `python jobs/run.py` does, and what came of it as an object."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.model.pair import Backbone
from pipeline.uri import parent, public

PLACE = ("run.folder=", "run.name=")  # of the run, which its recipe does not say


@dataclass(frozen=True)
class Trained:
    """A run that is finished.

    Attributes:
        folder: the run folder, or the working copy of a remote one.
        results: of each stage, by its name; `text` says it in a sentence.
    """

    folder: Path
    results: dict[str, dict[str, Any]]

    @property
    def scores(self) -> dict[str, float]:
        """What the evaluation measured of the trained teacher: `eval/knn20_top1`, health."""
        return dict(self.results.get("evaluate", {}).get("trained", {}))

    @property
    def weights(self) -> dict[str, Path]:
        """The exported folders by format: `dinov2`, `huggingface`, `timm`; `module` of an
        encoder of one's own.
        """
        formats = self.results.get("export", {}).get("formats", {})
        return {name: self.folder / "weights" / name for name in formats}

    @property
    def onnx(self) -> dict[str, Path]:
        """The files in ONNX by name, e.g. `fp32-224.onnx`; none without `export.onnx`."""
        files = self.results.get("export", {}).get("onnx", {})
        return {name: self.folder / "weights" / "onnx" / name for name in files}

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.folder / "report.html"

    @property
    def verdict(self) -> str:
        """The sentence of the evaluation card on whether anything was learnt; "" without a card."""
        card = self.folder / "evaluate" / "card.json"
        return str(json.loads(card.read_text())["verdict"]["text"]) if card.is_file() else ""

    @cached_property
    def backbone(self) -> Backbone:
        """The exported backbone, in eval mode on the CPU: `[B, C, S, S]` to `[B, D]`.

        Raises:
            PipelineError: the run exported none, or its weights are gone.
        """
        from pipeline.model.foreign_weights import load_any

        names = [name for name in ("dinov2", "timm", "module") if name in self.weights]
        place = self.weights[names[0]] if names else None
        if place is None:
            raise PipelineError(f"{self.folder} has no exported weights", "call train again")
        return load_any(place)[0].eval()


def train(
    source: str | Path,
    out: str | Path,
    recipe: str | Path = "",
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """Packs, curates, pretrains, evaluates and exports: `python jobs/run.py recipe data.source=…`.

    Starts a Ray on this machine and ends it, or joins the one of `RAY_ADDRESS`. The same call
    again goes on where the last one ended; a finished run is only read.

    Without a recipe it looks at images and machine, takes the recipe that `start` would write, and
    says so in a line. That recipe stands in the run folder, `recipe.yaml`, and later calls of the
    run take it from there. Where settings name `model.init`, `optim.passes` or `optim.steps`,
    nothing is chosen: all other fields have their defaults.

    Args:
        source: images, as `data.source`: a folder, archives, parquet, a URI. Where the recipe is
            chosen and there are `train/` and `val/` in it, `train/` is trained on.
        out: the run folder: `run.folder` and `run.name` in one.
        recipe: a YAML file, e.g. `configs/demo.yaml`; default: the one that fits.
        settings: other fields by their names, e.g. `{"optim.lr": 1e-3}`; they stand above the
            recipe.

    Raises:
        PipelineError: for whatever the user can mend; without a recipe also fewer than 100 images,
            settings that name a network, or a run that began with another recipe.
        SystemExit: after Ctrl-C or SIGTERM, which end training in a checkpoint.
    """
    from pipeline.stages import ORDER

    settings = settings or {}
    fields = {"data.source": str(source)}
    if not recipe:
        overrides = fields_of("train", out, fields, settings)
        recipe, fields["data.source"] = _chosen(overrides)
    return Trained(*run_stages("train", ORDER, out, fields, recipe, settings))


def _chosen(overrides: Mapping[str, Any]) -> tuple[str, str]:
    """The recipe that an earlier call or this one chooses, "" where none is asked for, and what is
    trained on.
    """
    from pipeline.api.chosen_recipe import (
        ENOUGH,
        check_open,
        choose_recipe,
        kept_recipe,
        source_of,
    )

    say_on_console()
    out, name, source = overrides["run.folder"], overrides["run.name"], overrides["data.source"]
    recipe = kept_recipe(out, name)
    if recipe is None:
        if any(overrides.get(field) for field in ENOUGH):
            return "", source
        check_open(out, name, overrides)
        asked = [words for words in as_words(overrides) if not words.startswith(PLACE)]
        recipe = choose_recipe(out, name, asked)
    return str(recipe), source_of(recipe, source)


def run_stages(
    call: str,
    stages: Sequence[str],
    out: str | Path,
    fields: Mapping[str, Any],
    recipe: str | Path,
    settings: Mapping[str, Any],
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Runs stages as a job does; gives the run folder and the results by stage.

    Args:
        call: the name of the function, for messages.
        stages: to run.
        out: the run folder.
        fields: what the call's own arguments say, by field.
        recipe: a YAML file, or "".
        settings: other fields.

    Raises:
        PipelineError: for whatever the user can mend.
    """
    from pipeline.config.load import load
    from pipeline.rounds import run
    from pipeline.storage.run_folder import RunFolder

    overrides = fields_of(call, out, fields, settings)
    config = load([str(recipe)] * bool(recipe) + as_words(overrides))
    say_on_console()
    run(config, stages)
    done = RunFolder.of(config.run.folder, config.run.name)
    results = {stage: done.last(stage) for stage in stages}
    return done.path, {stage: result for stage, result in results.items() if result}


def fields_of(
    call: str, out: str | Path, fields: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All fields that a call sets, the run folder's among them.

    Args:
        call: the name of the function, for messages.
        out: the run folder.
        fields: what the call's own arguments say, by field.
        settings: other fields.

    Raises:
        PipelineError: a Ray is running in this process, or a field is given twice.
    """
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        raise PipelineError(
            f"a Ray is running in this process, and {call} starts or joins its own",
            f"call ray.shutdown() first; {call} joins the cluster of RAY_ADDRESS",
        )
    folder, name = parent(str(out).rstrip("/"))
    fields = {**fields, "run.folder": str(folder), "run.name": name}
    if twice := sorted(fields.keys() & settings.keys()):
        shown = public(str(fields.get("data.source", "")))
        raise PipelineError(
            f"{', '.join(twice)} in settings: that is what {call}('{shown}', "
            f"out='{public(str(out))}') says",
            "give it once",
        )
    return {**fields, **settings}


def say_on_console() -> None:
    """Shows what a job says, where the program has set up no log of its own."""
    from pipeline import log

    if not logging.getLogger("pipeline").handlers:
        log.configure()


def as_words(fields: Mapping[str, Any]) -> list[str]:
    """Fields as the command line has them."""
    return [f"{name}={settings_text(value)}" for name, value in fields.items()]


def settings_text(value: Any) -> str:
    """A value as the command line has it."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)
