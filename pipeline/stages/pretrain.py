"""The pretrain stage."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from pipeline.config.config import Config
from pipeline.config.load import field_paths
from pipeline.config.network import Model
from pipeline.context import Context, result_line
from pipeline.driver import cluster
from pipeline.driver.machine import machine
from pipeline.evaluate.sets import remarks
from pipeline.images.value_range import FULL, shown
from pipeline.model.encoders.module import ModuleBackbone
from pipeline.model.encoders.source import digest_of
from pipeline.model.pair import Backbone, Pair
from pipeline.plan.plan import Plan
from pipeline.plan.resume import MAY_CHANGE, value_at
from pipeline.stages.checks.guard import ended_before, remarks_on_keep
from pipeline.stages.checks.teacher import located, teacher_source
from pipeline.stages.checks.weights import check_weights
from pipeline.stages.console.brief import brief, trained
from pipeline.stages.tracked import pipeline_page
from pipeline.storage.run_folder import RunFolder, fingerprint
from pipeline.stream.order import layout_of
from pipeline.stream.reader import group_rows
from pipeline.train import build, estimate, start
from pipeline.train.checkpoint import state
from pipeline.train.distil.lines import objective_line, teacher_lines
from pipeline.train.encoders.kept import encoder_files, write_encoder
from pipeline.train.evaluator import evaluation_spec
from pipeline.train.guard.begin import described, is_guarded
from pipeline.train.run import check_resume, plan_for, pretrain, write_plan
from pipeline.train.speed.cost import Cost
from pipeline.train.tune.choose import tuned, with_running_means
from pipeline.train.tune.share import said
from pipeline.uri import public
from pipeline.views.photometric import skipped_operations

FEW = 20_000  # images, below which a network from nothing learns little of what they show
log = logging.getLogger("pipeline.train")


def plan(context: Context) -> Plan:
    """The plan on this cluster, with the weights that it starts from."""
    config, shards = context.config, context.shards()
    planned = cluster.with_room(
        lambda machine: plan_for(config, shards, machine), config.resources.wait_s
    )
    return located(planned, context.folder)


def key(context: Context) -> str:
    """Changes with whatever a resumed run may not change, and with the images.

    Raises:
        PipelineError: where such a change meets a checkpoint, or weights to begin with meet images
            of other values; said here, before Ray is started.
    """
    config, shards = context.config, context.shards()
    check_weights(config, context.folder, shards)
    layout = layout_of(group_rows(shards))
    check_resume(
        config, shards.digest, context.folder, layout, value_range=shards.columns.value_range
    )
    fixed = {
        path: value_at(config, path) for path, _ in field_paths() if not path.startswith(MAY_CHANGE)
    }
    deep = shards.columns.value_range
    code = encoder_files(config, state.latest(context.folder.checkpoints))
    return fingerprint(
        [fixed, shards.digest] + [deep] * (deep != FULL) + [digest_of(code)] * bool(code)
    )


def intact(context: Context) -> bool:
    """Its checkpoints are looked for by the stages that read them. A run that its guard has ended
    goes on where the guard is turned off.
    """
    guarded = context.folder.last("pretrain").get("status") == "guarded"
    return not guarded or is_guarded(context.config)


def check_encoder(config: Config, folder: RunFolder) -> None:
    """Makes the encoder of `model.encoder=module:…` once: what is wrong is said before any work.

    Raises:
        PipelineError: what is wrong.
    """
    build.pair(config, encoder_files(config, state.latest(folder.checkpoints)))


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Trains or resumes. The result has status `finished`, `guarded` or `stopped`."""
    if result := ended_before(context):
        result_line("pretrain", result["text"])
        tracker.note(result["text"])
        return result
    shards = context.shards()
    run_plan = plan(context)
    # a wrong evaluation set is said before training
    spec = evaluation_spec(run_plan, shards, guarded=True)
    compared = spec.compared(run_plan.config.evaluate.during_training)
    if compared:
        result_line("kNN", f"while training: {compared}")
    if context.asked is None:  # an adaptation has said it
        for remark in check_weights(run_plan.config, context.folder, shards):
            log.warning("init: %s", remark)
    for remark in remarks(run_plan.config, shards):
        log.warning("evaluation: %s", remark)
    for remark in remarks_on_keep(run_plan.config, shards):
        log.warning("guard: %s", remark)
    for change in check_resume(
        run_plan.config,
        shards.digest,
        context.folder,
        run_plan.layout,
        run_plan.window_images,
        run_plan.value_range or FULL,
    ):
        log.info("changed     %s", change)
    tracker.artifact(write_plan(run_plan, context.folder))
    if (code := write_encoder(run_plan, context.folder)) is not None:
        tracker.artifact(code)
    tracker.dataset("train", shards.digest, public(context.shards_uri), "training", shards.rows)
    # MLflow prints them above every picture: the others are on the page of the whole
    tracker.params({"workers": run_plan.workers, "precision": run_plan.precision})
    whole = context.tracking.tracker
    # MLflow shows them in the order in which they come
    whole.params(pipeline_page.parameters(run_plan))
    whole.recipe(pipeline_page.changed_fields(context.config))
    name = pipeline_page.name_of_images(context.config)
    whole.dataset(name, shards.digest, public(context.shards_uri), "training", shards.rows)
    lines = _described(run_plan, context.folder)
    for line in lines if context.only else brief(lines):
        log.info("%s", line)
    outcome = pretrain(
        run_plan,
        shards,
        context.folder,
        context.tracking.worker_settings("pretrain", context.config.track.system_metrics),
        tracker,
        teacher_source(run_plan),
    )
    details = outcome.details
    text = trained(outcome, run_plan, compared)
    result_line("pretrain", text)
    tracker.note(text + (f"\n\n**Alarm:** {details['alarm']}" if details.get("alarm") else ""))
    return {
        "text": text,
        "status": outcome.status,
        "step": outcome.step,
        "steps": run_plan.steps,
        "machine": machine(),
        **details,
    }


def starting_pair(plan: Plan, folder: RunFolder) -> Pair:
    """The networks as the workers will make them, so that weights that do not fit are said here.

    Raises:
        PipelineError: as `pipeline.train.start` says.
    """
    saved = state.latest(folder.checkpoints)
    if saved is None and plan.init:
        built, text = start.starting_pair(plan)
        log.info("init        %s", text)
    else:
        built = build.pair(plan.config, plan.encoder_files, not plan.headless)
    return start.with_frozen_teacher(tuned(built, plan.config), plan, teacher_source(plan))


def params(plan: Plan) -> dict[str, Any]:
    """What a model's page says of its training."""
    return {
        "model": _model(plan.config),
        "images": plan.images,
        "steps": plan.steps,
        "batch": plan.config.optim.global_batch_size,
        "lr": f"{plan.lr:.3g}",
        "workers": plan.workers,
        "precision": plan.precision,
        "seed": plan.config.run.seed,
    }


def _residual(plan: Plan) -> list[str]:
    """Where the type that was asked for between two blocks is not the one there."""
    if plan.config.train.residual == "float32" or plan.precision == "bfloat16":
        return []
    return ["            train.residual=bfloat16 is not used: precision is float32"]


def _range(plan: Plan) -> list[str]:
    """Which numbers of workers an elastic run may have."""
    asked = plan.config.train.workers
    if not isinstance(asked, tuple):
        return []
    low, high = asked
    sizes = ", ".join(map(str, plan.sizes))
    parts = plan.workers * plan.accumulation
    left = high - low + 1 - len(plan.sizes)
    said = f"            {sizes} of [{low}, {high}] divide the {parts} micro batches of a step"
    return [said + (f"; the other {left} are not used" if left else "")]


def _streams(plan: Plan) -> list[str]:
    """How decoders are shared out, where there is more than one stream, or was to be."""
    asked = plan.config.resources.streams
    if asked != "auto" and asked > plan.streams:
        return [
            f"streams     {plan.streams} of resources.streams={asked}: each needs a worker "
            f"and a decoder, and there are {plan.workers} and {plan.decode_tasks}"
        ]
    if plan.streams == 1:
        return []
    few, more = plan.decode_tasks // plan.streams, -(-plan.decode_tasks // plan.streams)
    each = f"{few}" if few == more else f"{few} or {more}"
    one = "one for each node with workers" if asked == "auto" else "resources.streams"
    return [
        f"streams     {plan.streams} ({one}), each with about {each} of the "
        f"{plan.decode_tasks} decoders of {plan.decode_cpus:g} CPUs"
    ]


def _expected(plan: Plan) -> list[str]:
    """What so few images can teach a network that begins with random weights."""
    if plan.images >= FEW or plan.init or plan.frozen_teacher:
        return []
    return [
        f"expect      {plan.images:,} images, each seen {plan.steps / plan.steps_per_pass:.0f} "
        "times, teach colours, textures and parts: the verdict says whether that beats a colour "
        "histogram",
        "            released weights, if you can get some, give more from so few: jobs/adapt.py",
    ]


def _unused(model: Model, backbone: Backbone) -> str:
    """Names the fields of our ViT that a recipe sets and a foreign encoder does not use."""
    sizes: Iterable[str] = ("patch_size", "in_channels", "drop_path")
    if isinstance(backbone, ModuleBackbone) and backbone.spec is not None:
        patches = ("patch_size",) * backbone.has_patches
        sizes = ("in_channels", *backbone.spec.taken(), *patches)
    used = ("encoder", "init", "init_resize", *sizes)
    plain = Model()
    ignored = [
        f"model.{name}"
        for name in Model.model_fields
        if name not in used and getattr(model, name) != getattr(plain, name)
    ]
    return f" (not used: {', '.join(ignored)})" if ignored else ""


def _model(config: Config) -> str:
    model = config.model
    tune = "" if config.train.tune == "all" else f", {config.train.tune}"
    if model.encoder != "dinov2":
        return model.encoder + tune
    width, depth, _ = model.dimensions
    return f"{model.size} {width}x{depth}/{model.patch_size}{tune}"


def digest_shown(digest: str) -> str:
    """The beginning of a digest; words that stand in its place, whole."""
    return digest if " " in digest else f"{digest[:14]}…"


def _described(plan: Plan, folder: RunFolder) -> list[str]:
    built = starting_pair(plan, folder)  # it goes with this function: training needs the memory
    return describe(plan, built, estimate.estimated_cost(plan, built))


def describe(plan: Plan, built: Pair, cost: Cost) -> list[str]:
    """What differs from the defaults, what was derived, and what it will cost."""
    config = plan.config
    width, depth, heads = config.model.dimensions
    batch = config.optim.global_batch_size
    guard = described(config)
    kept = config.train.keep_last + 1 + bool(guard)  # the best one, and the start
    ours, backbone = config.model.encoder == "dinov2", built.student.backbone
    network = (
        f"{width} wide, {depth} deep, {heads} heads, patch {config.model.patch_size}, "
        f"{config.model.registers} registers"
        if ours
        else f"{config.model.encoder}, {backbone.width} wide{_unused(config.model, backbone)}"
    )
    skipped = skipped_operations(config.model.in_channels)
    beside = "an adapter" if plan.headless else "heads"
    lines = [
        f"model       {network}; {cost.parameters / 1e6:.1f} M parameters with {beside}",
        f"objective   {objective_line(plan)}",
        *teacher_lines(plan, built),
    ]
    if config.train.tune != "all":
        lines.append(f"tune        {config.train.tune}: {said(built)}")
        if config.train.tune == "heads" and config.train.freeze_backbone_steps:
            lines.append("            train.freeze_backbone_steps is not used: no backbone learns")
    if config.model.init and with_running_means(built.student.backbone):
        means = "the running means of model.init, which stay (train.batch_norm)"
        if config.train.batch_norm == "batch":
            means = "the batch; train.batch_norm=kept keeps the running means of model.init"
        lines.append(f"norm        BatchNorm of the backbone uses {means}")
    if plan.value_range not in (None, FULL):
        lines.append(
            f"range       values {shown(plan.value_range)} of images of more than 8 bits become 0 "
            "to 255 (data.range)"
        )
    if skipped:
        lines.append(
            f"colour      {', '.join(skipped)} need RGB and are skipped: images have "
            f"{config.model.in_channels} channels"
        )
    lines += [
        f"data        {plan.images:,} images ({digest_shown(plan.digest)}), "
        f"{plan.steps_per_pass} steps a pass, {plan.dropped_per_pass} left out of each pass",
        f"steps       {plan.steps:,} x {batch} = {plan.steps * batch:,} images, "
        f"{plan.steps / plan.steps_per_pass:.2f} passes, warm-up {plan.warmup_steps}",
        *_expected(plan),
        f"workers     {plan.workers} x {plan.micro_batch} images x {plan.accumulation}, "
        f"{plan.device}, {plan.precision} ({plan.precision_reason}), "
        f"{plan.threads} threads each, lr {plan.lr:.3g}",
        *_residual(plan),
        *_range(plan),
        *_streams(plan),
        f"memory      about {cost.memory_bytes / 2**30:.2f} GiB for the steps of a worker: "
        f"{cost.memory.line()}",
        f"disk        checkpoints {cost.checkpoint_bytes / 2**20:,.0f} MiB each, {kept} kept and "
        "one in memory",
        *[f"guard       {guard}"] * bool(guard),
    ]
    return lines
