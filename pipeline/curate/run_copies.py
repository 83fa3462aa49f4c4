"""The steps of a curation that compare images: the threshold, leaks, components of copies, and
copies of images that were curated earlier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.config.config import Config
from pipeline.curate.copies import relative
from pipeline.curate.copies.components import LOOKED_EDGES, find_components
from pipeline.curate.copies.leaks import best_leaks, leaks_of
from pipeline.curate.copies.matches import EARLIER
from pipeline.curate.copies.pairs import find_pairs
from pipeline.curate.copies.stored_copies import Copies
from pipeline.curate.findings import Found, fingerprints, vectors_of
from pipeline.curate.images import exact_copies
from pipeline.curate.images.descriptor import visiting
from pipeline.curate.look.looks import Looking, counted
from pipeline.curate.models import embedder_of
from pipeline.curate.report.copies import FAR
from pipeline.curate.rows.tables import POOL, Inputs, Vectors
from pipeline.curate.run_earlier import Earlier, check_inputs
from pipeline.curate.steps.steps import Result, Task, run_step
from pipeline.curate.threshold.calibrate import calibrate
from pipeline.curate.threshold.threshold import DEFAULT_PENALTY
from pipeline.errors import DataError
from pipeline.shards.shards import ShardSet
from pipeline.uri import join, public

FALSE_PAIRS = 0.01  # of the images, that are in a pair that is wrongly taken for copies
MOST_FALSE = 1e-6  # share of the pairs
BELOW = 0.1  # so far below the threshold pairs are kept too, so that the report can show them


def compare(found: Found, prints: Result, exact: Result) -> None:
    """Finds copies within the inputs, of evaluation sets, and of what was curated earlier.

    Where images are compared with anything, they are left in buckets for what is added later.
    """
    config, sets, earlier = found.config, found.sets, list(found.sets.earlier)
    if not (config.dedup.enabled or sets.leaks or earlier):
        return
    spec = embedder_of(config, "curate.copy_embedder", config.curate.copy_embedder)
    found.copy_spec = spec
    vectors = vectors_of(found, found.root, "embed_copy", found.inputs, prints, spec)
    found.copy_vectors = vectors
    _thresholds(found, vectors, prints, exact, earlier)
    matches = _matches(found, vectors, exact, earlier)
    _pairs(found, vectors, prints, exact, matches)


def false_positives(config: Config, images: int) -> float:
    """Share of unlike pairs that may be taken for copies.

    n images have n² / 2 pairs, so a share fit for thousands of images is not for millions. With
    0.01 / n one image in a hundred is in a false pair, and one in two hundred is lost by it.
    """
    share = config.dedup.false_positives
    return share if share != "auto" else min(MOST_FALSE, FALSE_PAIRS / max(1, images))


def _thresholds(
    found: Found, vectors: Vectors, prints: Result, exact: Result, earlier: list[Earlier]
) -> None:
    config, spec = found.config, found.copy_spec
    assert spec is not None
    threshold = config.dedup.threshold
    found.penalty = DEFAULT_PENALTY if vectors.views else 0.0
    if earlier:  # similarities must mean the same as there
        first = earlier[0].result
        found.penalty = float(first["penalty"])
        threshold = first["threshold"]
        if first["embedder"][:2] != spec.identity[:2]:
            raise DataError(
                f"curate.against={public(earlier[0].run)} was made with another copy embedder "
                f"({first['copy_embedder']}) than curate.copy_embedder={spec.name}",
                "use the same one, or curate everything anew without curate.against",
            )
        check_inputs(earlier[0], spec)
    elif threshold == "auto":
        calibration, step = calibrate(
            found.root,
            found.inputs,
            prints,
            exact,
            spec,
            vectors,
            images=config.dedup.calibration_images,
            target=false_positives(config, exact_copies.own(exact)),
            seed=config.run.seed,
            max_pixels=config.data.max_image_pixels,
            channels=config.model.in_channels,
        )
        found.add(step)
        found.calibration = calibration
        threshold, found.penalty = calibration.threshold, calibration.penalty
    leaks = config.leaks.threshold
    found.threshold = float(threshold)
    found.leak_threshold = float(threshold if leaks == "auto" else leaks)


def _pairs(
    found: Found, vectors: Vectors, prints: Result, exact: Result, matches: list[Result]
) -> None:
    config, sets, inputs = found.config, found.sets, found.inputs
    dedup = config.dedup
    views = visiting if vectors.views else None
    assert found.threshold is not None and found.leak_threshold is not None
    pairs = find_pairs(
        found.root,
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
        compare=dedup.enabled,
        suffices=max(0.0, found.threshold - FAR),
    )
    found.results += pairs.steps
    aside = list(matches)
    if sets.leaks:
        evaluated = {name: _evaluation_set(found, name, s) for name, s in sets.leaks.items()}
        others = {name: (one, found.leak_prints[name]) for name, (one, _) in evaluated.items()}
        leaks, steps = relative.find_leaks(
            pairs,
            inputs,
            evaluated,
            threshold=found.leak_threshold,
            visiting=views,
            looking=_looking(found, others),
            gpus=found.gpus,
        )
        found.add(leaks, "leaks", steps)
        found.numbers["leaked"] = _leaked(steps)
        aside.append(leaks)
    if not dedup.enabled:
        return
    found.folders["edges"] = pairs.edges
    components, steps = find_components(
        pairs,
        inputs,
        vectors,
        fingerprints=(prints.folder, prints.key),
        threshold=found.threshold,
        guard=dedup.guard,
        chains=dedup.chains,
        aside=[(one.folder, one.key) for one in aside],
        visiting=views,
        looking=_looking(found),
    )
    found.add(components, "components", steps)
    found.folders["looks"] = next(one.folder for one in steps if one.step == LOOKED_EDGES)
    found.numbers["looks"] = _looks(found.results)
    if sets.leaks and config.leaks.scope == "components":
        _leaking(found)


def _looking(found: Found, others: Mapping[str, tuple[Inputs, str]] | None = None) -> Looking:
    config = found.config
    channels, most = config.model.in_channels, config.data.max_image_pixels
    return Looking(found.inputs, channels, most, others)


def _looks(results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """By what was compared: pairs that got the second look, and what it said."""
    return {
        result.step.removesuffix("/looked").removesuffix("/looks"): counted(result)
        for result in results
        if result.step.endswith("/looked")
    }


def _leaked(steps: tuple[Result, ...]) -> dict[str, int]:
    """Images of each evaluation set that have a match, of those that have any."""
    counts: Counter[str] = Counter()
    for step in steps:
        for account in step.accounts:
            counts.update(account.get("held", {}))
    return dict(counts)


def _evaluation_set(found: Found, name: str, shards: ShardSet) -> tuple[Inputs, Vectors]:
    inputs = Inputs.of([(name, POOL, shards)])
    root = join(found.root, "sets", f"leaks-{name}")
    prints = fingerprints(found, root, inputs)
    found.leak_prints[name] = prints.folder
    assert found.copy_spec is not None
    found.add(replace(prints, step=f"fingerprint/{name}"))
    return inputs, vectors_of(found, root, "embed_copy", inputs, prints, found.copy_spec)


def _leaking(found: Found) -> None:
    """The best leak of each component, for all of its rows go."""
    tables, files = found.tables, found.inputs.files
    each = run_step(
        found.root,
        "leaking/files",
        found.keys,
        [Task(file.name, (file, tables)) for file in files],
        leaks_of,
    )
    task = Task("leaking", (tuple(file.name for file in files), each.folder))
    best = run_step(found.root, "leaking/best", [each.key], [task], best_leaks)
    found.add(each)
    found.add(best)
    found.tables = replace(tables, leaking=best.folder)
    found.keys.append(["leaking", best.key])


def _matches(found: Found, vectors: Vectors, exact: Result, earlier: list[Earlier]) -> list[Result]:
    """Copies of images that were curated earlier: the step for each of the earlier curations."""
    assert found.threshold is not None
    results = []
    shards = found.sets.earlier_shards
    others = {EARLIER: (Inputs.of([(EARLIER, POOL, shards)]), "")} if shards else {}
    for number, one in enumerate(earlier):
        copies = Copies.open(one.root)
        names, key = one.decisions()
        matches, steps = relative.find_matches(
            join(found.root, "against", f"{number:03d}"),
            copies,
            found.inputs,
            vectors,
            decisions=(str(join(one.root, "decisions")), names, key),
            threshold=found.threshold,
            visiting=visiting if vectors.views else None,
            exact=(exact.folder, exact.key),
            looking=_looking(found, others),
            gpus=found.gpus,
        )
        found.add(matches, steps=steps)
        found.keys.append(["matches", matches.key])
        results.append(matches)
    found.tables = replace(found.tables, matches=tuple(one.folder for one in results))
    return results
