"""The steps of a curation that choose: what seed sets ask for, and a balanced sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.curate.choose.balance import balance
from pipeline.curate.choose.hierarchy import build
from pipeline.curate.choose.lloyd import Cost, Resources
from pipeline.curate.choose.retrieve import Wanted, retrieve
from pipeline.curate.decide import removals
from pipeline.curate.findings import Found, fingerprints, vectors_of
from pipeline.curate.images import exact_copies
from pipeline.curate.models import embedder_of
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import AS_IS, POOL, InputFile, Inputs, Vectors
from pipeline.curate.steps.steps import Result, Task, run_step
from pipeline.shards.shards import ShardSet
from pipeline.uri import join


def select(found: Found, prints: Result) -> None:
    """Retrieves and balances, as far as the recipe asks for it, what is no copy and does not leak.

    Images of seed sets that are inputs are kept anyway, so only those of the pool are chosen from.
    """
    config, sets = found.config, found.sets
    if not sets.seeds and not config.balance.images:
        return
    files, starts = found.inputs.files, removals.starts_of(found.inputs)
    alive = run_step(
        found.root,
        "alive",
        found.keys,
        [Task(file.name, (file, starts, found.tables)) for file in files],
        removals.alive,
    )
    found.add(alive)
    spec = embedder_of(config, "curate.embedder", config.curate.embedder)
    same = found.copy_spec is not None and spec.settings == found.copy_spec.settings
    vectors = found.copy_vectors if same else None
    if vectors is None:
        vectors = vectors_of(found, found.root, "embed", found.inputs, prints, spec)
    pool = _rows(vectors, files, alive, [file for file in files if file.kind == POOL])
    resources = Resources(gpus=found.gpus)
    if sets.seeds:
        seeds = {}
        for name, shards in sets.seeds.items():
            if sets.include:
                mine = [f for f in files if f.kind == AS_IS and f.set == name]
                seeds[name] = _rows(vectors, files, alive, mine)
                found.seed_prints[name] = prints.folder
            else:
                seeds[name] = _outside(found, name, shards)
        wanted = Wanted(**config.retrieve.model_dump(exclude={"seeds", "include"}))
        retrieved = retrieve(
            found.root, "retrieve", pool, seeds, wanted, config.run.seed, resources
        )
        _add(found, retrieved.result, "retrieved", retrieved.cost)
        found.numbers["retrieved"] = retrieved.summary
    if config.balance.images:
        settings = config.balance
        hierarchy = build(
            found.root,
            "hierarchy",
            pool,
            settings.levels,
            config.run.seed,
            settings.iterations,
            settings.resampling,
            resources,
        )
        chosen = balance(
            found.root,
            "balance",
            pool,
            hierarchy,
            settings.images or 0,
            config.run.seed,
            settings.floor,
            settings.floor_members,
        )
        cost = Cost()
        cost.add(hierarchy.cost)
        cost.add(chosen.cost)
        _add(found, chosen.result, "balanced", cost)
        sizes = ("sizes_before", "sizes_after")
        found.numbers["balanced"] = {k: v for k, v in chosen.summary.items() if k not in sizes}


def _rows(
    vectors: Vectors, files: Sequence[InputFile], alive: Result, wanted: Sequence[InputFile]
) -> RowSet:
    """The rows of some of the files that are alive."""
    counts = dict(zip((f.name for f in files), (a["rows"] for a in alive.accounts), strict=True))
    names = tuple(file.name for file in wanted)
    return RowSet.of(
        replace(vectors, names=names), [counts[name] for name in names], alive.folder, alive.key
    )


def _outside(found: Found, name: str, shards: ShardSet) -> RowSet:
    """Vectors of a seed set whose images do not go into the curated set."""
    inputs = Inputs.of([(name, AS_IS, shards)])
    root = join(found.root, "sets", f"seeds-{name}")
    prints = fingerprints(found, root, inputs)
    found.seed_prints[name] = prints.folder
    found.add(replace(prints, step=f"fingerprint/{name}"))
    exact = exact_copies.collapse(root, inputs, prints)
    # An image that is there twice would count as two seeds.
    own = run_step(
        root,
        "own",
        [exact.key],
        [Task(file.name, (exact.folder, file.name)) for file in inputs.files],
        exact_copies.own_rows,
    )
    config = found.config
    spec = embedder_of(config, "curate.embedder", config.curate.embedder)
    vectors = vectors_of(found, root, "embed", inputs, prints, spec)
    counts = [account["rows"] for account in own.accounts]
    return RowSet.of(vectors, counts, own.folder, own.key)


def _add(found: Found, result: Result, name: str, cost: Cost) -> None:
    """Notes a step with what all that led to it has cost."""
    whole = replace(
        result,
        step=name,
        seconds=cost.seconds,
        cpu_s=cost.cpu_s,
        peak_bytes=cost.peak_bytes,
    )
    found.add(whole, name)
