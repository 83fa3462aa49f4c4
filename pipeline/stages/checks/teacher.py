"""The weights that a plan starts from and the teacher that it names, looked up before it begins."""

from __future__ import annotations

from pipeline.embed.teacher import TeacherSource, teacher_of
from pipeline.plan.plan import Plan
from pipeline.storage.run_folder import RunFolder
from pipeline.train import start
from pipeline.train.checkpoint import state


def located(planned: Plan, folder: RunFolder) -> Plan:
    """The plan with the very weights that it starts from and that its teacher has.

    Raises:
        PipelineError: there is no such teacher, or it has changed since the run began.
    """
    begun = start.located(planned, state.latest(folder.checkpoints))
    source = teacher_source(begun)
    return begun.model_copy(update={"teacher_digest": source.digest}) if source else begun


def teacher_source(plan: Plan) -> TeacherSource | None:
    """What opens the teacher whose features are learnt; None where a plan names none."""
    if not plan.learns_features:
        return None
    settings, run = plan.config.distill, plan.config.run
    place, digest = plan.frozen_teacher, plan.teacher_digest
    return teacher_of(place, settings.image_size, run.folder, digest)
