"""The steps of a curation in order, each of which goes on where an earlier run stopped.

Every step writes files below `<run folder>/curate/steps` and is not run again as long as its
settings and what it reads stay the same; so another threshold costs what comes after it.
"""

from __future__ import annotations

from pipeline.config.config import Config
from pipeline.curate.decide import decide as deciding
from pipeline.curate.decide.decide import Mix
from pipeline.curate.decide.removals import starts_of
from pipeline.curate.decide.shards import write_curated
from pipeline.curate.decide.sources import list_folders, sources_of
from pipeline.curate.decide.tally import Tally
from pipeline.curate.findings import Found, fingerprints
from pipeline.curate.images import exact_copies, quality
from pipeline.curate.images.quality import Rules
from pipeline.curate.run_choose import select
from pipeline.curate.run_copies import compare
from pipeline.curate.sets import Sets
from pipeline.curate.steps.steps import Result, Task, run_step
from pipeline.shards.shards import ShardSet
from pipeline.uri import Place


def decide(config: Config, sets: Sets, root: Place) -> Found:
    """Runs all steps up to the decisions; needs a joined Ray cluster.

    Args:
        config: the recipe.
        sets: what goes in.
        root: folder of the steps, that all nodes reach.

    Raises:
        PipelineError: a table is damaged, or a step could not do its work.
    """
    import ray

    gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
    found = Found(config, sets, sets.inputs, root, gpus)
    prints = found.add(fingerprints(found, root, found.inputs), "fingerprint")
    marks = None
    if config.quality.enabled:
        marks = found.add(quality.quality(root, found.inputs, prints, rules(config)), "quality")
    exact = found.add(exact_copies.collapse(root, found.inputs, prints, marks), "exact")
    compare(found, prints, exact)
    select(found, prints)
    _decisions(found)
    return found


def rules(config: Config) -> Rules:
    """The limits of the quality rules."""
    return Rules(**config.quality.model_dump(exclude={"enabled", "sample"}))


def _decisions(found: Found) -> None:
    files, tables, config = found.inputs.files, found.tables, found.config
    listed = run_step(
        found.root,
        "sources",
        found.keys[:1],
        [Task(file.name, (file, tables.fingerprint)) for file in files],
        list_folders,
    )
    sources = sources_of(listed.accounts)
    starts = starts_of(found.inputs)
    names = {name: [s.root, s.folders] for name, s in sources.items()}

    def decided(step: str, shares: dict[str, float]) -> Result:
        mix = Mix(config.run.seed, shares)
        return run_step(
            found.root,
            step,
            [2, found.keys, found.inputs.digest, names, mix.seed, sorted(shares.items())],
            [Task(file.name, (file, starts, tables, sources[file.set], mix)) for file in files],
            deciding.decide,
        )

    shares = weights(config)
    if config.mix.by == "proportion":
        whole = found.add(decided("parts", {}))
        shares = proportions(shares, Tally.of(found.inputs, whole.accounts).total_parts())
    decisions = decided("decisions", {part: w for part, w in shares.items() if w < 1})
    found.add(listed)
    found.results.append(decisions)
    found.folders["decisions"] = decisions.folder
    found.tally = Tally.of(found.inputs, decisions.accounts)


def weights(config: Config) -> dict[str, float]:
    """Of each part."""
    mix = config.mix
    return {
        "pool": mix.pool,
        "as_is": mix.as_is,
        "sample": mix.sample,
        "cluster": mix.cluster,
        "balanced": mix.balanced,
    }


def proportions(weights: dict[str, float], images: dict[str, int]) -> dict[str, float]:
    """The shares of the parts that make them stand to each other like their weights.

    The part that is scarcest for its weight is kept whole, and no image is repeated. Parts without
    images are passed over.

    Args:
        weights: of each part.
        images: of the parts that have any.
    """
    wanted = {part: weights[part] for part, count in images.items() if count and weights[part]}
    unit = min((images[part] / weight for part, weight in wanted.items()), default=0.0)
    return {
        part: min(1.0, unit * weight / images[part]) if part in wanted else 0.0
        for part, weight in weights.items()
    }


def write_shards(found: Found, shards: Place) -> ShardSet:
    """Writes what is kept, and what was curated earlier, to the folder `shards`.

    Raises:
        DataError: nothing is kept, or the folder holds something else.
    """
    data = found.config.data
    written, steps, again = write_curated(
        shards,
        found.root,
        found.sets.inputs_by_name,
        found.inputs,
        found.decisions,
        found.folders["fingerprint"],
        shard_bytes=int(data.shard_mb * 2**20),
        row_group_images=data.row_group_images,
        earlier=found.sets.earlier_shards,
    )
    found.results += steps
    earlier = found.sets.earlier_shards
    found.counted.check([written.rows - (earlier.rows - again if earlier else 0)])
    return written
