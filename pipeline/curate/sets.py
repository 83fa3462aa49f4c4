"""The image sets that a curation reads: what is curated, seed sets, evaluation sets."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from pipeline.config.config import Config
from pipeline.context import Context, is_shards, open_packed_shards
from pipeline.curate.copies.pairs import Index
from pipeline.curate.earlier import Earlier, earlier_runs
from pipeline.curate.rows.tables import AS_IS, POOL, Inputs
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.shards.overlap import shared_classes
from pipeline.shards.set_range import difference
from pipeline.shards.shards import ShardSet, open_shards
from pipeline.storage.places import absolute_uri
from pipeline.uri import public

log = logging.getLogger("pipeline.curate")

POOL_NAME = "pool"  # what the images are called that are not of a seed set
QUERIES = "queries"  # the evaluation set of `evaluate.queries`


@dataclass(frozen=True)
class Sets:
    """The sets by name, as opened.

    Attributes:
        pool: what is curated.
        seeds: sets that retrieval begins from.
        leaks: evaluation sets, whose images must not be trained on.
        include: whether seed images go into the curated set.
        earlier: curations that these images are added to, the latest first.
        earlier_shards: what they kept.
    """

    pool: ShardSet
    seeds: dict[str, ShardSet]
    leaks: dict[str, ShardSet]
    include: bool
    earlier: tuple[Earlier, ...] = ()
    earlier_shards: ShardSet | None = None

    @property
    def inputs(self) -> Inputs:
        """All images that a decision is made on."""
        seeds = self.seeds if self.include else {}
        kept_as_is = [(name, AS_IS, shards) for name, shards in seeds.items()]
        return Inputs.of([(POOL_NAME, POOL, self.pool), *kept_as_is])

    @property
    def inputs_by_name(self) -> list[tuple[str, ShardSet]]:
        """The sets of `inputs`."""
        return [(POOL_NAME, self.pool), *(self.seeds.items() if self.include else ())]

    @property
    def digests(self) -> dict[str, str]:
        """What says whether any image of any set has changed."""
        every = {POOL_NAME: self.pool}
        every |= {f"seeds.{name}": shards for name, shards in self.seeds.items()}
        every |= {f"leaks.{name}": shards for name, shards in self.leaks.items()}
        if self.earlier_shards is not None:
            every["earlier"] = self.earlier_shards
        return {name: f"{shards.uri} {shards.digest}" for name, shards in every.items()}


def open_sets(context: Context) -> Sets:
    """Opens all sets that the recipe names.

    Raises:
        PipelineError: one is not there, is not packed, or has a name that is taken.
    """
    config = context.config
    earlier = open_earlier(config)
    pool = open_packed_shards(config, context.folder)
    seeds, leaks = open_other_sets(config)
    seeds = {n: _in_range_of(pool, config, f"retrieve.seeds.{n}", s) for n, s in seeds.items()}
    leaks = {n: _in_range_of(pool, config, f"leaks.sets.{n}", s) for n, s in leaks.items()}
    curated = None
    if earlier:
        curated = open_shards(earlier[0].result["shards"], field="curate.against")
        curated = _in_range_of(pool, config, "curate.against", curated)
    sets = Sets(pool, seeds, leaks, config.retrieve.include, tuple(earlier), curated)
    _check_output(context, sets)
    labelled = sets.inputs_by_name + ([("curate.against", curated)] if curated else [])
    shared_classes(labelled)  # the curated shards hold them all: said before anything is curated
    return sets


def open_other_sets(
    config: Config, packing: bool = False
) -> tuple[dict[str, ShardSet], dict[str, ShardSet]]:
    """The seed sets and the evaluation sets that the recipe names.

    Args:
        config: the recipe.
        packing: a set of `evaluate.queries` that is not packed will be, so it is left out.

    Raises:
        PipelineError: one is not there, is not packed, or has a name that is taken.
    """
    leaks = dict(config.leaks.sets)
    queries = config.evaluate.queries
    if queries:
        if QUERIES in leaks:
            raise ConfigError(
                f"leaks.sets.{QUERIES} has the name of the set of evaluate.queries",
                "give it another name",
            )
        if not packing or is_shards(queries):
            leaks[QUERIES] = queries
    for name in config.retrieve.seeds:
        if name == POOL_NAME or "/" in name:
            raise ConfigError(
                f"a seed set cannot be called {name}", "choose another name in retrieve.seeds"
            )
    seeds = {
        name: opened(config, f"retrieve.seeds.{name}", uri)
        for name, uri in sorted(config.retrieve.seeds.items())
    }
    fields = {name: f"leaks.sets.{name}" for name in leaks} | {QUERIES: "evaluate.queries"}
    return seeds, {name: opened(config, fields[name], uri) for name, uri in sorted(leaks.items())}


def open_earlier(config: Config) -> list[Earlier]:
    """The curations that these images are added to, the latest first.

    Raises:
        PipelineError: they cannot be compared with, or not as the recipe says.
    """
    earlier = earlier_runs(config.curate.against) if config.curate.against else []
    for one in earlier:
        if one.result["threshold"] is None:
            raise DataError(
                f"{public(one.run)} was curated without comparing images (dedup.enabled=false and "
                "no evaluation set), so new images cannot be compared with it",
                "curate it again with dedup.enabled=true, or leave curate.against empty and "
                "curate all images together",
            )
        Index.open(one.root)  # refused now, and not after hours of decoding
    threshold = config.dedup.threshold
    if earlier and threshold != "auto" and threshold != earlier[0].result["threshold"]:
        raise ConfigError(
            f"dedup.threshold={threshold}, but {public(earlier[0].run)} was curated with "
            f"{earlier[0].result['threshold']:.6g}, and one set has one threshold",
            "leave dedup.threshold out: the one of curate.against is used",
        )
    return earlier


def _check_output(context: Context, sets: Sets) -> None:
    """Refuses to write where something is read: the output is emptied before it is written."""
    output = absolute_uri(context.shards_uri).rstrip("/")
    read = {"data.shards": sets.pool, "curate.against": sets.earlier_shards}
    read |= {f"retrieve.seeds.{name}": shards for name, shards in sets.seeds.items()}
    read |= {f"leaks.sets.{name}": shards for name, shards in sets.leaks.items()}
    for field, shards in read.items():
        uri = shards.uri.rstrip("/") if shards is not None else ""
        if uri and f"{uri}/".startswith(f"{output}/"):
            raise ConfigError(
                f"the curated shards would be written to {public(output)}, which is read as "
                f"{field}={public(uri)}",
                "give this run another run.name, or set curate.shards",
            )


def _in_range_of(pool: ShardSet, config: Config, field: str, shards: ShardSet) -> ShardSet:
    """A set that is read with the range of the pool's values; said where its own is another."""
    mapped, channels = pool.columns.value_range, config.model.in_channels
    if text := difference(f"the images of {field}", shards, mapped, channels):
        log.warning("%s", text)
    return replace(shards, value_range=pool.value_range)


def opened(config: Config, field: str, uri: str) -> ShardSet:
    """The set that a field names.

    Raises:
        DataError: it is not there or not packed; what to do names the field.
    """
    try:
        return open_shards(uri, config.data.image_column, config.data.label_column, field)
    except StorageError:
        raise
    except DataError as error:
        more = "jobs/pack.py packs it with the same arguments" if field[0] in "eg" else ""
        raise DataError(
            f"{field}={public(uri)} cannot be read as shards: {error.what}",
            "; ".join(filter(None, [more, error.hint])),
        ) from error
