"""The steps of a curation that choose: what seed sets ask for, and a balanced sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.curate.choose import retrieve as retrieving
from pipeline.curate.choose.balance import Balanced, Sample, balanced_sample
from pipeline.curate.choose.hierarchy import Levels, build
from pipeline.curate.choose.retrieve import Retrieved
from pipeline.curate.choose.seed_clusters import Retrieval
from pipeline.curate.curation import Embedded, Known, OtherSet, Seeds, Setup
from pipeline.curate.decide.decide import list_left, starts_of
from pipeline.curate.images import exact_copies
from pipeline.curate.models import embedder_of
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import AS_IS, POOL, InputFile, Inputs, Vectors
from pipeline.curate.run_images import embed_images, open_other_set
from pipeline.curate.steps.steps import Resources, Result, Steps, Task, run_step
from pipeline.uri import join


def what_is_left(setup: Setup, known: Known) -> Result:
    """Images that are usable, no copy, and do not leak."""
    starts = starts_of(setup.images)
    tasks = [Task(file.name, (file, starts, known.tables)) for file in setup.images.files]
    return run_step(setup.root, "alive", known.keys, tasks, list_left)


def embed_content(setup: Setup, prints: Result, for_copies: Embedded | None) -> Embedded:
    """The vectors that say what images show.

    Where the same embedder finds copies its vectors serve for both, and no step is taken.
    """
    config = setup.config
    spec = embedder_of(config, "curate.embedder", config.curate.embedder)
    if for_copies is None:
        return embed_images(setup, "embed", prints, spec)
    if for_copies.spec.settings == spec.settings:
        return Embedded(spec, for_copies.vectors, ())
    content = embed_images(setup, "embed", prints, spec)
    before = {step.step for step in for_copies.steps}  # which images are equal may be known
    steps = tuple(step for step in content.steps if step.step not in before)
    return Embedded(spec, content.vectors, steps)


def pool_rows(setup: Setup, content: Embedded, left: Result) -> RowSet:
    """What is left of the pool: images of seed sets that are inputs are kept anyway."""
    files = [file for file in setup.images.files if file.kind == POOL]
    return _rows(setup, content.vectors, left, files)


def open_seeds(setup: Setup, prints: Result, content: Embedded, left: Result) -> Seeds:
    """Vectors of the seed images: of what is left of them, where they are inputs themselves."""
    sets = setup.sets
    if not sets.include:
        opened = {name: _outside(setup, name, content) for name in sets.seeds}
        return Seeds(
            {name: rows for name, (_, rows) in opened.items()},
            {name: other.prints.folder for name, (other, _) in opened.items()},
            tuple(step for other, _ in opened.values() for step in other.steps),
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
    steps, resources = Steps(setup.root), Resources(gpus=setup.gpus)
    own, seed = steps.below("retrieve"), config.run.seed
    retrieved = retrieving.retrieve(own, pool, seeds.rows, settings, seed, resources)
    return replace(retrieved, result=steps.sum_up("retrieved", retrieved.result, tuple(steps.done)))


def balance(setup: Setup, pool: RowSet) -> Balanced:
    """A sample of the pool that has as much of what is rare as of what is common."""
    settings, seed = setup.config.balance, setup.config.run.seed
    levels = Levels(tuple(settings.levels), seed, settings.iterations, settings.resampling)
    sample = Sample(settings.images or 0, seed, settings.floor, settings.floor_members)
    steps = Steps(setup.root)
    hierarchy = build(steps.below("hierarchy"), pool, levels, Resources(gpus=setup.gpus))
    balanced = balanced_sample(steps.below("balance"), pool, hierarchy, sample)
    return replace(balanced, result=steps.sum_up("balanced", balanced.result, tuple(steps.done)))


def _rows(setup: Setup, vectors: Vectors, left: Result, files: Sequence[InputFile]) -> RowSet:
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
    root = join(setup.root, "sets", f"seeds-{name}")
    other = open_other_set(setup, name, root, inputs, "embed", content.spec)
    # An image that is there twice would count as two seeds.
    equal = exact_copies.collapse(root, inputs, other.prints)
    tasks = [Task(file.name, (equal.folder, file.name)) for file in inputs.files]
    own = run_step(root, "own", [equal.key], tasks, exact_copies.own_rows)
    counts = [account["rows"] for account in own.accounts]
    return other, RowSet.of(other.embedded.vectors, counts, own.folder, own.key)
