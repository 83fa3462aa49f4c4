"""The curation's part of the recipe: what its presets mean, and fields that would be ignored.

A field that is set and that nothing would read is refused: who sets it expects something of it. It
counts as set where it is neither its default nor what the preset says. What stands beside an
`enabled=false` is not refused: that is a switch, to be turned and turned back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.config import Config
    from pipeline.config.section import Section

Values = dict[str, dict[str, Any]]

# What a preset means where a recipe does not say it. `dedup` and `balanced` are the defaults of the
# fields; `lvd142m` has the numbers of the DINOv2 paper (section 3, appendix A).
_PRESETS: dict[str, Values] = {
    "lvd142m": {
        "dedup": {"chains": "keep"},
        "leaks": {"scope": "components"},
        "retrieve": {
            "neighbours": 4,
            "clusters": 100_000,
            "cluster_seeds": 3,
            "cluster_images": 10_000,
            "cap": 1_000_000,
        },
    },
}
# The paper's thresholds are those of SSCD, which comes as ONNX; other vectors are calibrated.
_LVD142M_SSCD: Values = {"dedup": {"threshold": 0.6}, "leaks": {"threshold": 0.45}}

# Plans in checkpoints may hold it, for they hold all fields in full: the default once.
OLD_EMBEDDER_DEFAULT = ("curate", "embedder", "descriptor")

SECTIONS = ("quality", "dedup", "leaks", "retrieve", "balance", "mix")


def preset_values(preset: str, copy_embedder: str) -> Values:
    """By section, what a preset sets."""
    values = {name: dict(fields) for name, fields in _PRESETS.get(preset, {}).items()}
    if preset == "lvd142m" and copy_embedder.partition("?")[0].endswith(".onnx"):
        for name, fields in _LVD142M_SSCD.items():
            values[name] = values.get(name, {}) | fields
    return values


def problems(config: Config) -> list[str]:
    """All that is wrong with the curation's fields, a sentence each."""
    return [*_missing(config), *_ignored(config)] if config.curate.preset else _off(config)


def _off(config: Config) -> list[str]:
    """Without a preset nothing is curated, and nothing of the curation is read."""
    rounds = config.curate.rounds
    if rounds > 1:
        return [
            f"curate.rounds={rounds} chooses images by what was trained, and curate.preset is "
            "empty, so nothing is chosen; set curate.preset=balanced and balance.images=…, or "
            "rounds=1"
        ]
    set_here = [] if config.curate.query else _user_set(config, "curate", {})
    set_here += [name for name in SECTIONS if _user_set(config, name, {})]
    if not set_here:
        return []
    return [
        f"{', '.join(set_here)} would be ignored: curate.preset is empty, so nothing is curated; "
        "set curate.preset=dedup"
    ]


def _user_set(config: Config, names: str, preset: Values) -> list[str]:
    """The fields that are neither their default nor what the preset says, as `section.field`.

    Args:
        config: the recipe.
        names: fields with blanks between; a section stands for all its fields.
        preset: what the preset sets.
    """
    fields = []
    for name in names.split():
        title, _, field = name.partition(".")
        section: Section = getattr(config, title)
        usual = type(section)(**preset.get(title, {}))
        for leaf in [field] if field else type(section).model_fields:
            value = getattr(section, leaf)
            if value != getattr(usual, leaf) and (title, leaf, value) != OLD_EMBEDDER_DEFAULT:
                fields.append(f"{title}.{leaf}")
    return fields


def _missing(config: Config) -> Iterator[str]:
    curate, mix = config.curate, config.mix
    if curate.preset == "balanced" and not config.balance.images:
        yield ("curate.preset=balanced does not know how many images to keep; set balance.images")
    if curate.preset == "lvd142m" and not config.retrieve.seeds:
        yield (
            "curate.preset=lvd142m retrieves images like those of seed sets, and there is none; "
            "set retrieve.seeds.<name>=shards"
        )
    if curate.rounds > 1 and not (config.retrieve.seeds or config.balance.images):
        yield (
            f"curate.rounds={curate.rounds}, but nothing is chosen by what images show, so each "
            "round would keep the same images; set balance.images or "
            "retrieve.seeds.<name>=shards, or rounds=1"
        )
    sets = bool(config.leaks.sets or config.evaluate.queries)  # else nothing can leak
    if sets and config.leaks.scope == "components" and not config.dedup.enabled:
        yield (
            "leaks.scope=components needs the components that dedup finds; set "
            "dedup.enabled=true or leaks.scope=images"
        )
    weights = {name: getattr(mix, name) for name in _PARTS}
    large = [name for name, weight in weights.items() if weight > 1]
    if mix.by == "share" and large:
        yield (
            f"mix.{large[0]}={weights[large[0]]:g} is no share: no image is repeated; set "
            "mix.by=proportion, where weights say how the parts stand to each other"
        )


_PARTS = ("pool", "as_is", "sample", "cluster", "balanced")


@dataclass(frozen=True)
class _Use:
    """When fields are read, and why they are not."""

    fields: str  # with blanks between; a section stands for all its fields
    read: bool
    why_not: str


def _ignored(config: Config) -> Iterator[str]:
    """A sentence for each reason why fields that are set would do nothing."""
    preset = preset_values(config.curate.preset, config.curate.copy_embedder)
    for use in _uses(config):
        fields = [] if use.read else _user_set(config, use.fields, preset)
        if fields:
            yield f"{', '.join(fields)} would be ignored: {use.why_not}"


def _uses(config: Config) -> list[_Use]:
    """What reads the fields that not every curation reads, in the order of its steps."""
    curate, dedup, retrieve = config.curate, config.dedup, config.retrieve
    sets = bool(config.leaks.sets or config.evaluate.queries)
    seeds, balanced = bool(retrieve.seeds), bool(config.balance.images)
    by_neighbours, by_clusters = retrieve.mode != "cluster", retrieve.mode != "sample"
    mode = f"retrieve.mode={retrieve.mode}"
    parts = (
        ("pool", not (seeds or balanced), "retrieval or balance choose from the pool"),
        ("as_is", seeds and retrieve.include, "no seed images are kept"),
        ("sample", seeds and by_neighbours, "nothing is retrieved as neighbours"),
        ("cluster", seeds and by_clusters, "nothing is retrieved by clusters"),
        ("balanced", balanced, "nothing is balanced"),
    )
    mixed = [part for part, there, _ in parts if there and getattr(config.mix, part)]
    return [
        _Use(
            "dedup.false_positives dedup.calibration_images",
            dedup.threshold == "auto",
            f"dedup.threshold={dedup.threshold} is given, so nothing is calibrated; set "
            "dedup.threshold=auto",
        ),
        _Use(
            "leaks",
            sets,
            "there is no evaluation set; set leaks.sets.<name>=shards or evaluate.queries",
        ),
        _Use("retrieve", seeds, "there is no seed set; set retrieve.seeds.<name>=shards"),
        # without seeds the row above has named these already
        _Use(
            "retrieve.neighbours retrieve.min_similarity",
            not seeds or by_neighbours,
            mode,
        ),
        _Use(
            "retrieve.clusters retrieve.cluster_seeds retrieve.cluster_images retrieve.cap",
            not seeds or by_clusters,
            mode,
        ),
        _Use("retrieve.sample_above", not seeds or retrieve.mode == "auto", mode),
        _Use(
            "balance",
            balanced,
            "balance.images is empty, so nothing is balanced; set balance.images",
        ),
        _Use(
            "curate.embedder",
            seeds or balanced,
            "only retrieval and balance read it; set retrieve.seeds.<name>=shards or "
            "balance.images",
        ),
        _Use(
            "curate.rounds_init",
            curate.rounds > 1,
            "there is one round, which starts as the recipe says; set curate.rounds=2",
        ),
        _Use(
            "curate.image_size curate.batch_size",
            curate.rounds > 1 or not {curate.copy_embedder, curate.embedder} <= {"", "descriptor"},
            "the descriptor has a size of its own; set curate.embedder or curate.copy_embedder",
        ),
        *(_Use(f"mix.{part}", there, why_not) for part, there, why_not in parts),
        _Use(
            "mix.by",
            len(mixed) != 1,
            f"there is one part only ({''.join(mixed)}), which stands to no other and is kept "
            "whole; set mix.by=share",
        ),
    ]
