"""The steps of a curation in order, each of which goes on where an earlier run stopped.

Every step writes files below `<run folder>/curate/steps` and is not run again as long as its
settings and what it reads stay the same; so another threshold costs what comes after it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pipeline.config import Config
from pipeline.curate import copies as copying
from pipeline.curate import decide as deciding
from pipeline.curate import exact_copies, fingerprint, quality
from pipeline.curate.copies import Copies
from pipeline.curate.decide import Mix, Tables
from pipeline.curate.calibrate import calibrate
from pipeline.curate.descriptor import visiting
from pipeline.curate.embed import embed
from pipeline.curate.embedders import EmbedderSpec
from pipeline.curate.shards import write_curated
from pipeline.curate.sources import list_folders, sources_of
from pipeline.curate.tables import POOL, Inputs, Vectors
from pipeline.curate.tally import Tally
from pipeline.curate.threshold import DEFAULT_PENALTY, Calibration
from pipeline.curate.work import Result, Task, run_step
from pipeline.data.schema import ShardSet
from pipeline.stages.curate_sets import Sets
from pipeline.stages.embedders import embedder_of
from pipeline.uri import Place, join

log = logging.getLogger("pipeline.curate")

BELOW = 0.1  # so far below the threshold pairs are kept too: the report shows them, and raising or
# lowering a threshold a little joins nothing again


@dataclass
class Found:
    """What the steps have found, for the report and the tracker.

    Attributes:
        root: folder of the steps.
        tally: of the decisions.
        results: of all steps, in order.
        folders: of the tables, by name (`report_read.NAMES`).
        leak_prints: fingerprints of each evaluation set.
        seed_prints: of each seed set.
        calibration: where a threshold was to be calibrated.
        threshold: above which two images are copies.
        leak_threshold: above which one is a copy of an image of an evaluation set.
        penalty: that the similarity of a crop is reduced by.
        gpus: of a task that compares.
        spec: what makes the vectors that find copies.
        copies: what joining left.
    """

    root: Place
    tally: Tally
    results: list[Result] = field(default_factory=list)
    folders: dict[str, str] = field(default_factory=dict)
    leak_prints: dict[str, str] = field(default_factory=dict)
    seed_prints: dict[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None
    threshold: float | None = None
    leak_threshold: float | None = None
    penalty: float = 0.0
    gpus: float = 0.0
    spec: EmbedderSpec | None = None
    copies: Copies | None = None

    def add(self, name: str, result: Result, steps: Iterable[Result] = ()) -> Result:
        """Notes a step and, with a name, its table."""
        self.results += [*steps] or [result]
        if name:
            self.folders[name] = result.folder
        return result


def decide(config: Config, sets: Sets, root: Place) -> Found:
    """Runs all steps up to the decisions; needs a joined Ray cluster.

    Args:
        config: the recipe.
        sets: what goes in.
        root: folder of the steps, that all nodes reach.

    Raises:
        PipelineError: a table is damaged, or a step could not do its work.
    """
    inputs = sets.inputs
    found = Found(root, Tally(inputs.rows, {}, {}))
    prints = found.add("fingerprint", _fingerprint(root, inputs, config))
    rules = quality.Rules(**config.quality.model_dump(exclude={"enabled", "sample"}))
    marks = None
    if config.quality.enabled:
        marks = found.add("quality", quality.quality(root, inputs, prints, rules))
    exact = found.add("exact", exact_copies.collapse(root, inputs, prints, marks))
    tables = Tables(prints.folder, marks.folder if marks else "", exact.folder)
    keys = [prints.key, marks.key if marks else "", exact.key]
    if config.dedup.enabled or sets.leaks:
        vectors = _calibrated(found, config, inputs, prints, exact)
        tables, more = _copies(found, config, sets, inputs, vectors, prints, exact, tables)
        keys += more
    # what chooses from what is left
    _decisions(found, config, inputs, tables, keys)
    return found


def write_shards(found: Found, config: Config, sets: Sets, shards: Place) -> ShardSet:
    """Writes what is kept to the folder `shards`.

    Raises:
        DataError: nothing is kept, or the folder holds something else.
    """
    decisions = next(r for r in reversed(found.results) if r.step == "decisions")
    written, steps = write_curated(
        shards,
        found.root,
        sets.inputs_by_name,
        sets.inputs,
        decisions,
        found.folders["fingerprint"],
        shard_bytes=int(config.data.shard_mb * 2**20),
        row_group_images=config.data.row_group_images,
    )
    found.results += steps
    found.tally.check([written.rows])
    return written


def _fingerprint(root: Place, inputs: Inputs, config: Config) -> Result:
    return fingerprint.fingerprint(
        root,
        inputs,
        max_pixels=config.data.max_image_pixels,
        channels=config.model.in_channels,
    )


def _vectors(
    found: Found,
    root: Place,
    step: str,
    inputs: Inputs,
    alive: Result | None,
    spec: EmbedderSpec,
    prints: Result,
    config: Config,
) -> Vectors:
    vectors, result = embed(
        root,
        step,
        inputs,
        alive,
        spec,
        fingerprints=prints,
        max_pixels=config.data.max_image_pixels,
        channels=config.model.in_channels,
    )
    if result is not prints:
        found.add("", result)
    return vectors


def _calibrated(
    found: Found, config: Config, inputs: Inputs, prints: Result, exact: Result
) -> Vectors:
    """Vectors that find copies, and the thresholds that go with them."""
    dedup, leaks = config.dedup, config.leaks
    spec = embedder_of(config, "curate.copy_embedder", config.curate.copy_embedder)
    found.spec = spec
    vectors = _vectors(found, found.root, "embed_copy", inputs, exact, spec, prints, config)
    found.penalty = DEFAULT_PENALTY if vectors.views else 0.0
    threshold = dedup.threshold
    if threshold == "auto":
        measured, step = calibrate(
            found.root,
            inputs,
            prints,
            exact,
            spec,
            images=dedup.calibration_images,
            target=dedup.false_positives,
            seed=config.run.seed,
            max_pixels=config.data.max_image_pixels,
        )
        found.add("", step)
        threshold, found.penalty = measured.threshold, measured.penalty
        found.calibration = measured
    found.threshold = threshold
    found.leak_threshold = threshold if leaks.threshold == "auto" else leaks.threshold
    return vectors


def _copies(
    found: Found,
    config: Config,
    sets: Sets,
    inputs: Inputs,
    vectors: Vectors,
    prints: Result,
    exact: Result,
    tables: Tables,
) -> tuple[Tables, list[str]]:
    """Pairs, leaks, components; the tables with them, and the keys of those steps."""
    root, dedup = found.root, config.dedup
    views = visiting if vectors.views else None
    assert found.threshold is not None and found.leak_threshold is not None
    pairs = copying.find_pairs(
        root,
        inputs,
        vectors,
        lowest=max(0.0, found.threshold - BELOW),
        probes=dedup.probes,
        exact=(exact.folder, exact.key),
        cell_images=dedup.cell_images,
        visiting=views,
        penalty=found.penalty,
        seed=config.run.seed,
        gpus=found.gpus,
    )
    found.copies = pairs
    found.results += pairs.steps
    keys = []
    leaks = None
    if sets.leaks:
        visitors = {name: _evaluation_set(found, config, name, s) for name, s in sets.leaks.items()}
        leaks, steps = copying.find_leaks(
            pairs, inputs, visitors, threshold=found.leak_threshold, visiting=views, gpus=found.gpus
        )
        found.add("leaks", leaks, steps)
        tables = replace(tables, leaks=leaks.folder)
        keys.append(leaks.key)
    if not dedup.enabled:
        return tables, keys
    found.folders["edges"] = pairs.edges
    components, steps = copying.find_components(
        pairs,
        inputs,
        vectors,
        fingerprints=(prints.folder, prints.key),
        threshold=found.threshold,
        guard=dedup.guard,
        chains=dedup.chains,
        leaks=(leaks.folder, leaks.key) if leaks else ("", ""),
        visiting=views,
    )
    found.add("components", components, steps)
    tables = replace(tables, components=components.folder)
    keys.append(components.key)
    if leaks and config.leaks.scope == "components":
        tables = replace(tables, leaking=_leaking(found, inputs, tables, keys))
    return tables, [*keys, config.leaks.scope]


def _evaluation_set(
    found: Found, config: Config, name: str, shards: ShardSet
) -> tuple[Inputs, Vectors]:
    inputs = Inputs.of([(name, POOL, shards)])
    root = join(found.root, "sets", f"leaks-{name}")
    prints = _fingerprint(root, inputs, config)
    found.add("", prints)
    found.leak_prints[name] = prints.folder
    assert found.spec is not None
    return inputs, _vectors(found, root, "embed_copy", inputs, None, found.spec, prints, config)


def _leaking(found: Found, inputs: Inputs, tables: Tables, keys: list[str]) -> str:
    """Where the best leak of each component is."""
    each = run_step(
        found.root,
        "leaking/files",
        keys,
        [Task(file.name, (file, tables)) for file in inputs.files],
        deciding.leaks_of,
    )
    names = tuple(file.name for file in inputs.files)
    task = Task("leaking", (names, each.folder))
    best = run_step(found.root, "leaking/best", [each.key], [task], deciding.best_leaks)
    found.add("", each)
    found.add("", best)
    return best.folder


def _decisions(
    found: Found, config: Config, inputs: Inputs, tables: Tables, keys: list[str]
) -> Result:
    listed = run_step(
        found.root,
        "sources",
        keys[:1],
        [Task(file.name, (file, tables.fingerprint)) for file in inputs.files],
        list_folders,
    )
    sources = sources_of(listed.accounts)
    mix = Mix(config.run.seed, _shares(config))
    names = {name: [s.root, s.folders] for name, s in sources.items()}
    result = run_step(
        found.root,
        "decisions",
        [1, keys, inputs.digest, names, mix.seed, sorted(mix.shares.items())],
        [
            Task(file.name, (file, inputs, tables, sources[file.set], mix))
            for file in inputs.files
        ],
        deciding.decide,
    )
    found.add("", listed)
    found.add("decisions", result)
    found.tally = Tally.of(inputs, result.accounts)
    return result


def _shares(config: Config) -> dict[str, float]:
    mix = config.mix
    every = {
        "pool": mix.pool,
        "as_is": mix.as_is,
        "sample": mix.sample,
        "cluster": mix.cluster,
        "balanced": mix.balanced,
    }
    return {part: share for part, share in every.items() if share < 1}
