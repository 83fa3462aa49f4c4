"""The last steps of a curation: a decision for each image, and shards of what is kept."""

from __future__ import annotations

from pipeline.config.config import Config
from pipeline.curate.curation import Curation, Decisions, Setup
from pipeline.curate.decide import decide as deciding
from pipeline.curate.decide.decide import Mix, starts_of
from pipeline.curate.decide.file_rows import Known
from pipeline.curate.decide.shard_write import Selection
from pipeline.curate.decide.shards import write_curated
from pipeline.curate.decide.tally import Tally, list_folders, sources_of
from pipeline.curate.steps.steps import Step
from pipeline.shards.shards import ShardSet
from pipeline.uri import Place


def decide(setup: Setup, known: Known) -> Decisions:
    """Decides on every image: the first reason to leave it out counts."""
    images, steps, files = setup.images, setup.steps, setup.images.by_name
    listed = steps.run("sources", list_folders, files, prints=known.prints)
    starts, sources = starts_of(images), sources_of(listed.accounts)

    def decided(name: str, shares: dict[str, float]) -> Step:
        mix = Mix(setup.config.run.seed, shares)
        return steps.run(name, deciding.decide, files, version=2, starts=starts, known=known,
                         sources=sources, mix=mix)  # fmt: skip

    shares = weights(setup.config)
    if setup.config.mix.by == "proportion":  # how many a part has is known when all are decided on
        whole = decided("parts", {})
        shares = proportions(shares, Tally.of(images, whole.accounts).total_parts())
    table = decided("decisions", {part: share for part, share in shares.items() if share < 1})
    return Decisions(table, Tally.of(images, table.accounts))


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
    mixed = {part: weights[part] for part, count in images.items() if count and weights[part]}
    unit = min((images[part] / weight for part, weight in mixed.items()), default=0.0)
    return {
        part: min(1.0, unit * weight / images[part]) if part in mixed else 0.0
        for part, weight in weights.items()
    }


def write_shards(curation: Curation, shards: Place) -> ShardSet:
    """Writes what is kept, and what was curated earlier, to the folder `shards`.

    Raises:
        DataError: nothing is kept, or the folder holds something else.
    """
    setup = curation.setup
    data, earlier = setup.config.data, setup.sets.earlier_shards
    selection = Selection(
        setup.sets.inputs_by_name,
        setup.images,
        curation.decisions.table,
        curation.known.prints.folder,
        earlier,
    )
    written, again = write_curated(
        shards,
        setup.steps.root,
        selection,
        shard_bytes=int(data.shard_mb * 2**20),
        row_group_images=data.row_group_images,
    )
    # Images of an earlier curation that came in again are in the shards once.
    curation.decisions.tally.check([written.rows - (earlier.rows - again if earlier else 0)])
    return written
