"""`--dry-run`: what a job would do, and what would stop it. What it tries leaves nothing behind."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from pipeline import rounds
from pipeline.config.config import Config
from pipeline.context import (
    Context,
    packed_uri,
    result_line,
    shards_uri,
    size_of,
    with_packed_sets,
)
from pipeline.curate.dry_run import TABLE_BYTES, curation_plan
from pipeline.doctor import fits
from pipeline.doctor.rounds_plan import say_rounds
from pipeline.doctor.scored import say_cards, say_evaluation
from pipeline.doctor.surroundings import machine_of, try_writing
from pipeline.errors import DataError, StorageError
from pipeline.evaluate.sets import KEEP, remarks
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve
from pipeline.shards.shards import ShardSet, open_shards
from pipeline.stages import adapt, embed, finetune, look, search
from pipeline.stages.chain import STAGES, by_name, named
from pipeline.stages.checks.known_sets import KnownSet, also_in
from pipeline.stages.checks.micro_batches import lighter
from pipeline.stages.checks.places import with_absolute_weights
from pipeline.stages.checks.start import check_start, embeds, voting
from pipeline.stages.checks.teacher import located
from pipeline.stages.checks.weights import check_weights
from pipeline.stages.evaluation import JOB, asked_for, chosen, is_own
from pipeline.stages.pretrain import describe, starting_pair
from pipeline.storage.once import looked_up_once
from pipeline.storage.places import exists, resolve_uri
from pipeline.storage.run_folder import RunFolder
from pipeline.train import estimate
from pipeline.train.run import check_resume
from pipeline.uri import is_uri, public

log = logging.getLogger("pipeline")
NOT_PACKED = "not packed yet"
NOT_CURATED = "not curated yet"  # the number of images is then that of all
Needs = list[tuple[str, str, float]]  # field, place, bytes


def dry_run(config: Config, stages: Sequence[str], machine: Machine | None = None) -> None:
    """Prints steps, images, memory, disk and time.

    Args:
        config: the recipe.
        stages: of the job.
        machine: one that is not here, for which the run is planned; default: this machine, or the
            cluster of RAY_ADDRESS.

    Raises:
        PipelineError: for all that would stop the real run at its start.
    """
    config = with_absolute_weights(named(config, stages))
    if list(stages) == ["search"]:
        search.describe(config)
        return
    if list(stages) == JOB and config.evaluate.cards:
        say_cards(config.evaluate.cards)
        return
    folder = RunFolder.of(config.run.folder, config.run.name)
    config, asked = adapt.begun(config, folder, stages)
    config, stages = asked_for(config, folder, stages)
    several = config.curate.rounds > 1 and not by_name(stages)
    if several:
        rounds.check(config, folder)
    with looked_up_once():
        known = check_start(config, stages)
    for place in (folder.uri, config.run.folder) if folder.uri else ():
        if exists(*resolve_uri(place)):  # in a folder that is not there, a mark of it would stay
            try_writing(place, b"")
            break
    if "pack" not in stages:
        config = with_packed_sets(config, folder)
        if stages[0] in STAGES:
            STAGES[stages[0]].key(Context(config, folder, only=len(stages) == 1))
    if machine is None:
        machine, _ = machine_of(config)
    else:
        text = "workers and memory are of it, folders and disks of this machine"
        result_line("machine", f"{machine.elsewhere}: {text}")
    log.info("run         %s in %s (dry run: nothing is written)", config.run.name, folder)
    needs: Needs = []
    packed = _opened(packed_uri(config, folder), config)
    images = packed.rows if packed else 0
    if "data.source" in known:
        images = images or known["data.source"].images
        _say_pack(config, folder, known["data.source"], packed, needs)
    elif "data.shards" in known:
        images = known["data.shards"].images
        log.info("data        %s: %s images", *_place_and_images(known["data.shards"]))
    for field in ("evaluate.queries", "evaluate.reference", KEEP):
        if field in known:
            section = field.partition(".")[0]
            log.info("%-11s %s: %s images", section, *_place_and_images(known[field]))
    digest, all_images = packed.digest if packed else NOT_PACKED, images
    if config.curate.preset and stages != ["doctor"]:
        if several:
            say_rounds(config, folder, machine, SetFacts(images, digest))
        if "curate" in stages:
            curation_plan(config, folder)
            needs += _curation_needs(config, folder, images, known)
        curated = _opened(shards_uri(config, folder), config)
        images, digest = (curated.rows, curated.digest) if curated else (images, NOT_CURATED)
    trains = "pretrain" in stages or ("evaluate" in stages and is_own(config))
    if trains and config.evaluate.queries:
        _say_evaluation(config, folder, known)
    elif "pretrain" in stages and (reference := voting(known)):
        _say_one_set(reference)
    if "adapt" in stages and asked is not None and images:
        config = _adapted(asked, config, folder, machine, images)
    if "pretrain" in stages and (
        known_images := known.get("data.shards") or known.get("data.source")
    ):
        for remark in check_weights(config, folder, known_images):
            log.warning("init: %s", remark)
    if "pretrain" in stages and images:
        _say_training(config, folder, machine, images, digest, needs)
    elif "pretrain" in stages:
        source = known.get("data.source")
        hidden = "the archives were not opened"
        if source is not None and source.files == ():
            hidden = "no file there is named as an image, and none was opened"
        log.info("pretrain    %s: pack first to see the plan", hidden)
    elif "evaluate" in stages and stages[-1] == "evaluate":
        say_evaluation(config, folder, known)
    elif "export" in stages:
        saved = chosen(Context(config, folder))
        log.info("%-11s the checkpoint at step %d", stages[0], saved.step)
    if embeds(config, stages):
        _say_embedding(config, folder, stages, all_images, needs)
    if "finetune" in stages and "pretrain" not in stages:
        log.info("finetune    %s", finetune.describe(config, folder, all_images))
    if list(stages) == ["look"]:
        log.info("look        %s", look.describe(Context(config, folder, only=True)))
    fits.say_disk(needs)


def _say_embedding(
    config: Config, folder: RunFolder, stages: Sequence[str], images: int, needs: Needs
) -> None:
    model, dim, patches = embed.expected(config, folder, "pretrain" in stages)
    size = images * embed.bytes_of_row(config, dim, patches)
    place = embed.vectors_uri(config, folder)
    outputs = ", ".join(config.embed.outputs)
    log.info(
        "embed       %s images by %s: %s of width %d, about %s in %s",
        _about(images) if not images else f"{images:,}",
        public(model),
        outputs,
        dim,
        size_of(size),
        public(place),
    )
    known = config.embed.model or "pretrain" not in stages
    if known and (before := embed.replaced_model(config, folder)):
        log.warning("%s holds vectors by %s: they are replaced", public(place), before)
    needs.append(("embed.vectors" if config.embed.vectors else "run.folder", place, size))


def _say_evaluation(config: Config, folder: RunFolder, known: Mapping[str, KnownSet]) -> None:
    """What the two sets of the evaluation share and lack, as far as it is known before the pack."""
    config = with_packed_sets(config, folder)
    sets = [config.evaluate.queries, config.evaluate.reference]
    training = _opened(shards_uri(config, folder), config)
    when = "" if training else " before curation" if config.curate.preset else ""
    training = training or _opened(packed_uri(config, folder), config)
    if training is not None and all(_opened(uri, config) for uri in sets if uri):
        for remark in remarks(config, training):
            log.warning("evaluation%s: %s", when, remark)
        return
    queries, reference = known.get("evaluate.queries"), voting(known)
    equal = also_in(reference, queries) if queries and reference else None
    if queries is None or reference is None or equal is None:
        log.info("evaluate    images that are in both sets are looked for once both are packed")
    elif equal:
        log.warning(
            "evaluation%s: %s of %s queries are also in %s, byte for byte: none of them votes for "
            "itself",
            when,
            f"{equal:,}",
            f"{queries.images:,}",
            reference.labels.place,
        )
    else:
        log.info("evaluate    no query is also in %s, byte for byte", reference.labels.place)


def _say_one_set(reference: KnownSet) -> None:
    """What is evaluated where no queries are named."""
    labels = reference.labels
    if labels.kind == "none":
        log.info(
            "evaluate    %s has no labels: health and rank_me, which is a weak guide", labels.place
        )
    else:
        known = "" if labels.kind != "unknown" else ", if they have labels"
        log.info("evaluate    k-NN: each image of %s by the others%s", labels.place, known)


def _say_pack(
    config: Config, folder: RunFolder, source: KnownSet, packed: ShardSet | None, needs: Needs
) -> None:
    log.info(
        "pack        %s: %s images, %.2f GiB of shards in %s",
        public(config.data.source),
        _about(source.images),
        source.size / 2**30,
        public(packed_uri(config, folder)),
    )
    if packed is None:  # the images once in the shards, and once more while they are sorted
        field = "data.shards" if config.data.shards else "run.folder"
        needs.append((field, packed_uri(config, folder), source.size))
        needs.append(("run.folder", str(folder.at("pack")), source.size))


def _curation_needs(
    config: Config, folder: RunFolder, images: int, known: Mapping[str, KnownSet]
) -> Needs:
    pool = known.get("data.source") or known["data.shards"]
    field = "curate.shards" if config.curate.shards else "run.folder"
    return [
        (field, shards_uri(config, folder), pool.size),
        ("run.folder", str(folder.at("curate")), images * TABLE_BYTES),
    ]


def _say_training(
    config: Config, folder: RunFolder, machine: Machine, images: int, digest: str, needs: Needs
) -> None:
    plan = resolve(config, SetFacts(images, digest), machine=machine)
    if digest not in (NOT_PACKED, NOT_CURATED):
        check_resume(config, digest, folder)
    plan = located(plan, folder)
    built = starting_pair(plan, folder)
    cost = estimate.estimated_cost(plan, built)
    for line in describe(plan, built, cost):
        log.info("%s", line)
    fits.say_memory(plan, cost, machine)
    checkpoints = (config.train.keep_last + 1.25) * cost.checkpoint_bytes
    log.info("checkpoints about %s, with the weights", size_of(checkpoints))
    if not is_uri(str(folder.at())):
        needs.append(("run.folder", str(folder.at()), checkpoints))
    fits.say_time(plan, cost, machine)


def _adapted(
    asked: Config, config: Config, folder: RunFolder, machine: Machine, images: int
) -> Config:
    """The recipe that the job would derive, printed with its reasons."""
    gpu = bool(machine.gpus) and asked.train.device != "cpu"
    facts, recipe = adapt.recipe_for(asked, images, gpu, folder)
    planned = recipe.applied(asked)
    plan = located(resolve(planned, SetFacts(images, NOT_PACKED), machine=machine), folder)
    if line := lighter(asked, plan, machine.gpu_bytes):
        recipe = recipe.with_line(line)
    adapt.say(facts, recipe, images)
    evaluation = {"evaluate": config.evaluate}
    return recipe.applied(asked).model_copy(update=evaluation)


def _about(images: int) -> str:
    return f"about {images:,}" if images else "an unknown number of"


def _place_and_images(known: KnownSet) -> tuple[str, str]:
    return known.labels.place, f"{known.images:,}" if known.shards else _about(known.images)


def _opened(uri: str, config: Config) -> ShardSet | None:
    """The shards at a place, where there are any."""
    try:
        data = config.data
        return open_shards(uri, data.image_column, data.label_column, labels=data.labels != "none")
    except StorageError:
        raise
    except DataError:
        return None
