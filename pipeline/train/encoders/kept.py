"""The text of `model.encoder=module:…` that a run keeps: read, written, compared, used.

It stands in the plan, and so in every checkpoint; `encoder/` of the run folder is for people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.config import Config
from pipeline.errors import PipelineError, TrainError
from pipeline.model.encoders.source import (
    PREFIX,
    Name,
    differing,
    digest_of,
    from_copy,
    read_source,
)
from pipeline.plan.plan import Plan
from pipeline.plan.resume import plan_of
from pipeline.storage.run_folder import RunFolder, atomic
from pipeline.train.checkpoint import state
from pipeline.uri import parent, public


def encoder_files(config: Config, saved: state.Saved | None = None) -> dict[str, str]:
    """The text of `model.encoder=module:…` on this machine, by the names of its files; {} for other
    encoders.

    Args:
        config: the recipe.
        saved: a checkpoint of the run, whose text counts where the module is not here any more.

    Raises:
        PipelineError: there is no such module.
    """
    if not config.model.encoder.startswith(PREFIX):
        return {}
    try:
        return read_source(Name.of(config.model.encoder))
    except PipelineError:
        earlier = plan_of(saved.meta, saved.path) if saved else None
        if earlier is None or earlier.config.model.encoder != config.model.encoder:
            raise
        return earlier.encoder_files


def say_copy(plan: Plan, saved: state.Saved) -> None:
    """Says that the encoder of a checkpoint is made from the text in it, where this machine has
    another.

    Raises:
        PipelineError: this machine runs no such code.
    """
    encoder = plan.config.model.encoder
    if plan.encoder_files:
        run = parent(parent(saved.path)[0])[0]
        from_copy(Name.of(encoder), plan.encoder_files, f"{public(run)}/encoder")


def check_unchanged(earlier: Plan, saved: state.Saved, folder: RunFolder) -> None:
    """Raises TrainError where the text of the encoder's module is not that of the checkpoint; says
    where the module is not here any more, and the run's text is used.
    """
    if not earlier.encoder_files:
        return
    name = Name.of(earlier.config.model.encoder)
    if differ := differing(name, earlier.encoder_files):
        raise TrainError(
            f"the code of model.encoder={name} was changed since run {folder.path.name} had its "
            f"checkpoint at step {saved.step}: {', '.join(differ)}",
            "give this run another name (run.name=…), or put back the text that lies in "
            f"{public(folder.at('encoder'))} to resume",
        )
    say_copy(earlier, saved)


def write_encoder(plan: Plan, folder: RunFolder) -> Path | None:
    """`encoder/` of the run: the text of `model.encoder=module:…`; None for other encoders."""
    for name, text in plan.encoder_files.items():
        with atomic(folder.path / "encoder" / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder.path / "encoder" if plan.encoder_files else None


def without_text(plan: Plan) -> dict[str, Any]:
    """A plan for `plan.yaml`: of the encoder's text its place in the run folder and its digest."""
    content = plan.model_dump(mode="json", exclude={"encoder_files"})
    if plan.encoder_files:
        content["encoder"] = {"folder": "encoder", "digest": digest_of(plan.encoder_files)}
    return content
