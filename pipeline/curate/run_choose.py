"""The steps of a curation that choose: what seed sets ask for, and a balanced sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.config.config import Config
from pipeline.curate.choose import retrieve as retrieving
from pipeline.curate.choose.balance import Balanced, Sample, balanced_sample
from pipeline.curate.choose.hierarchy import Levels, build
from pipeline.curate.choose.lloyd import TASK_ELEMENTS
from pipeline.curate.choose.retrieve import Retrieved
from pipeline.curate.choose.seed_clusters import CLUSTER, CLUSTER_ROWS, Retrieval
from pipeline.curate.curation import OtherSet, Seeds, Setup
from pipeline.curate.decide.decide import list_left, starts_of
from pipeline.curate.decide.file_rows import Known
from pipeline.curate.embed.embed import Embedded
from pipeline.curate.images.descriptor import DIM
from pipeline.curate.images.equal_images import equal_images, list_kept
from pipeline.curate.models import embedder_of
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import AS_IS, POOL, InputFile, Inputs, Vectors
from pipeline.curate.run_images import embed_images, open_other_set
from pipeline.curate.sets import Sets
from pipeline.curate.steps.steps import Resources, Step
from pipeline.embed.embedders import DESCRIPTOR, Embedder
from pipeline.errors import ConfigError
from pipeline.uri import public


def what_is_left(setup: Setup, known: Known) -> Step:
    """Images that are usable, no copy, and do not leak."""
    files, starts = setup.images.by_name, starts_of(setup.images)
    return setup.steps.run("alive", list_left, files, starts=starts, known=known)


def embed_content(setup: Setup, prints: Step, for_copies: Embedded | None) -> Embedded:
    """The vectors that say what images show.

    Where the same embedder finds copies its vectors serve for both, and no step is taken.
    """
    config = setup.config
    spec = embedder_of(config, "curate.embedder", config.curate.embedder)
    if for_copies and for_copies.spec.settings == spec.settings:
        return Embedded(spec, for_copies.vectors)
    return embed_images(setup, "embed", prints, spec)


def pool_rows(setup: Setup, content: Embedded, left: Step) -> RowSet:
    """What is left of the pool: images of seed sets that are inputs are kept anyway."""
    files = [file for file in setup.images.files if file.kind == POOL]
    return _rows(setup, content.vectors, left, files)


def open_seeds(setup: Setup, prints: Step, content: Embedded, left: Step) -> Seeds:
    """Vectors of the seed images: of what is left of them, where they are inputs themselves."""
    sets = setup.sets
    if not sets.include:
        opened = {name: _outside(setup, name, content) for name in sets.seeds}
        return Seeds(
            {name: rows for name, (_, rows) in opened.items()},
            {name: other.prints.folder for name, (other, _) in opened.items()},
        )
    rows = {}
    for name in sets.seeds:
        files = [f for f in setup.images.files if f.kind == AS_IS and f.set == name]
        rows[name] = _rows(setup, content.vectors, left, files)
    return Seeds(rows, dict.fromkeys(sets.seeds, prints.folder))


def retrieve(setup: Setup, pool: RowSet, seeds: Seeds) -> Retrieved:
    """Images of the pool that are like seed images."""
    config = setup.config
    settings = Retrieval(**config.retrieve.model_dump(exclude={"seeds", "include"}))
    aside, resources = setup.steps.aside(), Resources(gpus=setup.gpus)
    own, seed = aside.below("retrieve"), config.run.seed
    retrieved = retrieving.retrieve(own, pool, seeds.rows, settings, seed, resources)
    result = setup.steps.sum_up("retrieved", retrieved.result, aside.done)
    return replace(retrieved, result=result)


def balance(setup: Setup, pool: RowSet) -> Balanced:
    """A sample of the pool that has as much of what is rare as of what is common."""
    settings, seed = setup.config.balance, setup.config.run.seed
    levels = Levels(tuple(settings.levels), seed, settings.iterations, settings.resampling)
    sample = Sample(settings.images or 0, seed, settings.floor, settings.floor_members)
    aside = setup.steps.aside()
    hierarchy = build(aside.below("hierarchy"), pool, levels, Resources(gpus=setup.gpus))
    balanced = balanced_sample(aside.below("balance"), pool, hierarchy, sample)
    result = setup.steps.sum_up("balanced", balanced.result, aside.done)
    return replace(balanced, result=result)


def _rows(setup: Setup, vectors: Vectors, left: Step, files: Sequence[InputFile]) -> RowSet:
    """The rows that are left of some of the files."""
    counts = {
        file.name: account["rows"]
        for file, account in zip(setup.images.files, left.accounts, strict=True)
    }
    names = tuple(file.name for file in files)
    return RowSet.of(
        replace(vectors, names=names), [counts[name] for name in names], left.folder, left.key
    )


def _outside(setup: Setup, name: str, content: Embedded) -> tuple[OtherSet, RowSet]:
    """A seed set whose images do not go into the curated set."""
    inputs = Inputs.of([(name, AS_IS, setup.sets.seeds[name])])
    steps = setup.steps.below("sets", f"seeds-{name}", label=name)
    other = open_other_set(setup, steps, inputs, "embed", content.spec)
    # An image that is there twice would count as two seeds.
    equal = equal_images(steps, inputs, other.prints)
    own = steps.run("own", list_kept, inputs.by_name, equal=equal)
    counts = [account["rows"] for account in own.accounts]
    return other, RowSet.of(other.embedded.vectors, counts, own.folder, own.key)


# ---- Whether the clusterings that a recipe asks for fit into tasks, told before images are read.


WIDEST = 8192  # no vectors are wider; so few clusters always fit


def check_clusters(config: Config, sets: Sets) -> None:
    """Refuses more clusters than a task can hold.

    Vectors have the width of their model, so a model is opened here, but only where clusters are so
    many that it matters.

    Raises:
        ConfigError: too many clusters.
        PipelineError: the model cannot be opened.
    """
    rows, asked = sets.pool.rows, {}
    retrieval = Retrieval(**config.retrieve.model_dump(exclude={"seeds", "include"}))
    if any(retrieval.mode_of(seeds.rows) == CLUSTER for seeds in sets.seeds.values()):
        asked["retrieve.clusters"] = retrieval.clusters or max(1, rows // CLUSTER_ROWS)
    if config.balance.images and config.balance.levels:
        asked["balance.levels"] = config.balance.levels[0]
    counts = {field: min(count, rows) for field, count in asked.items()}
    if max(counts.values(), default=0) * WIDEST <= TASK_ELEMENTS:
        return
    spec = embedder_of(config, "curate.embedder", config.curate.embedder)
    width = DIM if spec.kind == DESCRIPTOR else Embedder(spec).dim
    for field, count in counts.items():
        if count * width > TASK_ELEMENTS:
            most = TASK_ELEMENTS // width
            raise ConfigError(
                f"{field}: {count:,} clusters of vectors of {width:,} numbers "
                f"(curate.embedder={public(config.curate.embedder)}) do not fit into a task of "
                f"2 GB: {most:,} do",
                f"set {field} to at most {most} "
                "(smaller clusters take more of them), or use an embedder with narrower vectors",
            )
