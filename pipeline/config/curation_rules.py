"""The curation's part of the recipe: what its presets mean, and fields that would be ignored.

A field that is set and that nothing would read is refused: who sets it expects something of it. It
counts as set where it is neither its default nor what the preset says. What stands beside an
`enabled=false` is not refused: that is a switch, to be turned and turned back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.config import Config, Section

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

SECTIONS = ("quality", "dedup", "leaks", "retrieve", "balance", "mix")


def preset_values(preset: str, copy_embedder: str) -> Values:
    """By section, what a preset sets."""
    found = {name: dict(fields) for name, fields in _PRESETS.get(preset, {}).items()}
    if preset == "lvd142m" and copy_embedder.partition("?")[0].endswith(".onnx"):
        for name, fields in _LVD142M_SSCD.items():
            found[name] = found.get(name, {}) | fields
    return found


def problems(config: Config) -> list[str]:
    """All that is wrong with the curation's fields, a sentence each."""
    return [*_missing(config), *_ignored(config)] if config.curate.preset else _off(config)


def _off(config: Config) -> list[str]:
    curate, usual = config.curate, type(config.curate)()
    set_here = [
        f"curate.{field}"
        for field in type(curate).model_fields
        if not curate.query and getattr(curate, field) != getattr(usual, field)
    ]
    named = [(name, getattr(config, name)) for name in SECTIONS]
    set_here += [name for name, section in named if section != type(section)()]
    if not set_here:
        return []
    return [
        f"{', '.join(set_here)} would be ignored: curate.preset is empty, so nothing is curated; "
        "set curate.preset=dedup"
    ]


def _missing(config: Config) -> Iterator[str]:
    curate, mix = config.curate, config.mix
    if curate.preset == "balanced" and not config.balance.images:
        yield ("curate.preset=balanced does not know how many images to keep; set balance.images")
    if curate.preset == "lvd142m" and not config.retrieve.seeds:
        yield (
            "curate.preset=lvd142m retrieves images like those of seed sets, and there is none; "
            "set retrieve.seeds.<name>=shards"
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


def _ignored(config: Config) -> Iterator[str]:
    """A sentence for each reason why fields that are set would do nothing."""
    curate, dedup, retrieve = config.curate, config.dedup, config.retrieve
    sets = bool(config.leaks.sets or config.evaluate.queries)
    seeds, balanced = bool(retrieve.seeds), bool(config.balance.images)
    values = preset_values(curate.preset, curate.copy_embedder)

    def user_set(name: str, fields: Iterable[str] | None = None, but: str = "") -> list[str]:
        section: Section = getattr(config, name)
        usual = type(section)(**values.get(name, {}))
        wanted = fields if fields is not None else type(section).model_fields
        return [
            f"{name}.{field}"
            for field in wanted
            if field not in but.split() and getattr(section, field) != getattr(usual, field)
        ]

    found: list[tuple[list[str], str]] = []

    def unless(read: bool, fields: list[str], why: str) -> None:
        if fields and not read:
            found.append((fields, why))

    unless(
        dedup.threshold == "auto",
        user_set("dedup", ("false_positives", "calibration_images")),
        f"dedup.threshold={dedup.threshold} is given, so nothing is calibrated; set "
        "dedup.threshold=auto",
    )
    unless(
        sets,
        user_set("leaks", but="sets"),
        "there is no evaluation set; set leaks.sets.<name>=shards or evaluate.queries",
    )
    unless(
        seeds,
        user_set("retrieve", but="seeds"),
        "there is no seed set; set retrieve.seeds.<name>=shards",
    )
    if seeds:
        by_neighbours, by_clusters = retrieve.mode != "cluster", retrieve.mode != "sample"
        why = f"retrieve.mode={retrieve.mode}"
        unless(by_neighbours, user_set("retrieve", ("neighbours", "min_similarity")), why)
        clustered = ("clusters", "cluster_seeds", "cluster_images", "cap")
        unless(by_clusters, user_set("retrieve", clustered), why)
        unless(retrieve.mode == "auto", user_set("retrieve", ("sample_above",)), why)
    unless(
        balanced,
        user_set("balance", but="images"),
        "balance.images is empty, so nothing is balanced; set balance.images",
    )
    unless(
        seeds or balanced,
        user_set("curate", ("embedder",)),
        "only retrieval and balance read it; set retrieve.seeds.<name>=shards or balance.images",
    )
    unless(
        {curate.copy_embedder, curate.embedder} != {"descriptor"},
        user_set("curate", ("image_size", "batch_size")),
        "the descriptor has a size of its own; set curate.embedder or curate.copy_embedder",
    )
    parts = (
        ("pool", not (seeds or balanced), "retrieval or balance choose from the pool"),
        ("as_is", seeds and retrieve.include, "no seed images are kept"),
        ("sample", seeds and retrieve.mode != "cluster", "nothing is retrieved as neighbours"),
        ("cluster", seeds and retrieve.mode != "sample", "nothing is retrieved by clusters"),
        ("balanced", balanced, "nothing is balanced"),
    )
    for part, there, why in parts:
        unless(there, user_set("mix", (part,)), why)
    mixed = [part for part, there, _ in parts if there and getattr(config.mix, part)]
    unless(
        len(mixed) != 1,
        user_set("mix", ("by",)),
        f"there is one part only ({''.join(mixed)}), which stands to no other and is kept whole; "
        "set mix.by=share",
    )
    for fields, why in found:
        yield f"{', '.join(fields)} would be ignored: {why}"
