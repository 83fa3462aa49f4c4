"""The steps of a curation that compare images: threshold, copies, leaks, earlier curations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.config.config import Config
from pipeline.curate.copies import relative
from pipeline.curate.copies.components import find_components
from pipeline.curate.copies.items import ImageSet
from pipeline.curate.copies.leaks import best_leaks, leaks_of
from pipeline.curate.copies.matches import EARLIER, find_matches
from pipeline.curate.copies.pairs import Search, find_pairs
from pipeline.curate.copies.stored_copies import Copies
from pipeline.curate.curation import Embedded, Finding, Known, Leaks, Setup, Threshold
from pipeline.curate.images import exact_copies
from pipeline.curate.images.descriptor import visiting
from pipeline.curate.look.looks import Looking
from pipeline.curate.models import embedder_of
from pipeline.curate.report.copies import FAR
from pipeline.curate.rows.tables import POOL, Inputs
from pipeline.curate.run_earlier import check_inputs
from pipeline.curate.run_images import embed_images, open_other_set
from pipeline.curate.steps.steps import Result, Task, run_step
from pipeline.curate.threshold.calibrate import calibrate
from pipeline.curate.threshold.threshold import DEFAULT_PENALTY
from pipeline.errors import DataError
from pipeline.uri import join, public

FALSE_PAIRS = 0.01  # of the images, that are in a pair that is wrongly taken for copies
MOST_FALSE = 1e-6  # share of the pairs
BELOW = 0.1  # so far below the threshold pairs are kept too, so that the report can show them


def embed_for_copies(setup: Setup, prints: Result) -> Embedded:
    """The vectors that copies are found by."""
    config = setup.config
    spec = embedder_of(config, "curate.copy_embedder", config.curate.copy_embedder)
    return embed_images(setup, "embed_copy", prints, spec)


def find_threshold(setup: Setup, prints: Result, equal: Result, embedded: Embedded) -> Threshold:
    """The similarity above which two images get a second look.

    It is that of the earlier curation that these images are added to; else that of the recipe; else
    it is calibrated on a sample.

    Raises:
        DataError: similarities do not mean the same as in the earlier curation.
    """
    config, spec = setup.config, embedded.spec
    penalty = DEFAULT_PENALTY if embedded.vectors.views else 0.0
    if setup.sets.earlier:
        latest = setup.sets.earlier[0]
        if latest.result["embedder"][:2] != spec.identity[:2]:
            raise DataError(
                f"curate.against={public(latest.run)} was made with another copy embedder "
                f"({latest.result['copy_embedder']}) than curate.copy_embedder={spec.name}",
                "use the same one, or curate everything anew without curate.against",
            )
        check_inputs(latest, spec)
        threshold = float(latest.result["threshold"])
        return Threshold(
            threshold, _leak_threshold(config, threshold), float(latest.result["penalty"])
        )
    if config.dedup.threshold != "auto":
        threshold = float(config.dedup.threshold)
        return Threshold(threshold, _leak_threshold(config, threshold), penalty)
    calibration, step = calibrate(
        setup.root,
        setup.images,
        prints,
        equal,
        spec,
        embedded.vectors,
        images=config.dedup.calibration_images,
        target=false_positives(config, exact_copies.own(equal)),
        seed=config.run.seed,
        max_pixels=config.data.max_image_pixels,
        channels=config.model.in_channels,
    )
    threshold = float(calibration.threshold)
    leaks = _leak_threshold(config, threshold)
    return Threshold(threshold, leaks, calibration.penalty, calibration, (step,))


def false_positives(config: Config, images: int) -> float:
    """Share of unlike pairs that may be taken for copies.

    n images have n² / 2 pairs, so a share fit for thousands of images is not for millions. With
    0.01 / n one image in a hundred is in a false pair, and one in two hundred is lost by it.
    """
    share = config.dedup.false_positives
    return share if share != "auto" else min(MOST_FALSE, FALSE_PAIRS / max(1, images))


def _leak_threshold(config: Config, threshold: float) -> float:
    leaks = config.leaks.threshold
    return threshold if leaks == "auto" else float(leaks)


def match_earlier(
    setup: Setup, equal: Result, embedded: Embedded, threshold: Threshold
) -> tuple[Finding, ...]:
    """Copies of images that were curated earlier: a table for each of the earlier curations."""
    shards = setup.sets.earlier_shards
    others = {EARLIER: (Inputs.of([(EARLIER, POOL, shards)]), "")} if shards else {}
    findings = []
    for number, earlier in enumerate(setup.sets.earlier):
        names, key = earlier.decisions()
        table, steps = find_matches(
            join(setup.root, "against", f"{number:03d}"),
            Copies.open(earlier.root),
            _image_set(setup.images, embedded, equal),
            decisions=(str(join(earlier.root, "decisions")), names, key),
            threshold=threshold.copies,
            looking=_looking(setup, others),
            gpus=setup.gpus,
        )
        findings.append(Finding(table, steps or (table,)))
    return tuple(findings)


def compare(setup: Setup, equal: Result, embedded: Embedded, threshold: Threshold) -> Copies:
    """Pairs of images that are alike. Images stay in buckets, for what is compared with them later.

    With `dedup.enabled=false` they are put into buckets only.
    """
    dedup = setup.config.dedup
    return find_pairs(
        setup.root,
        _image_set(setup.images, embedded, equal),
        Search(
            probes=dedup.probes,
            cell_images=dedup.cell_images,
            penalty=threshold.penalty,
            seed=setup.config.run.seed,
            gpus=setup.gpus,
        ),
        lowest=max(0.0, threshold.copies - BELOW),
        compare=dedup.enabled,
        suffices=max(0.0, threshold.copies - FAR),
    )


def find_leaks(setup: Setup, pairs: Copies, embedded: Embedded, threshold: Threshold) -> Leaks:
    """Images that show the same as an image of an evaluation set."""
    others = []
    for name, shards in setup.sets.leaks.items():
        inputs, root = Inputs.of([(name, POOL, shards)]), join(setup.root, "sets", f"leaks-{name}")
        others.append(open_other_set(setup, name, root, inputs, "embed_copy", embedded.spec))
    prints = {other.name: other.prints.folder for other in others}
    table, steps = relative.find_leaks(
        pairs,
        setup.images,
        {other.name: _image_set(other.inputs, other.embedded) for other in others},
        threshold=threshold.leaks,
        looking=_looking(setup, {o.name: (o.inputs, prints[o.name]) for o in others}),
        gpus=setup.gpus,
    )
    leaked: Counter[str] = Counter()
    for step in steps:
        for account in step.accounts:
            leaked.update(account.get("held", {}))
    opening = [step for other in others for step in other.steps]
    return Leaks(table, (*opening, *(steps or (table,))), prints, dict(leaked))


def group_copies(
    setup: Setup,
    pairs: Copies,
    prints: Result,
    embedded: Embedded,
    threshold: Threshold,
    going: Sequence[Finding],
) -> Finding:
    """Groups of copies, with the one that stays of each.

    Args:
        setup: of the curation.
        pairs: that are alike.
        prints: fingerprints, by which the best copy is told.
        embedded: vectors that the pairs were found by.
        threshold: above which a pair gets a second look.
        going: images that go in any case, so that none of them is kept instead of another.
    """
    table, steps = find_components(
        pairs,
        _image_set(setup.images, embedded),
        fingerprints=(prints.folder, prints.key),
        threshold=threshold.copies,
        guard=setup.config.dedup.guard,
        chains=setup.config.dedup.chains,
        aside=[(finding.table.folder, finding.table.key) for finding in going],
        looking=_looking(setup),
    )
    return Finding(table, steps or (table,))


def leaking_groups(setup: Setup, known: Known) -> Finding:
    """Groups of copies of which an image leaks, with the best leak: the whole group goes."""
    files = setup.images.files
    by_file = run_step(
        setup.root,
        "leaking/files",
        known.keys,
        [Task(file.name, (file, known.tables)) for file in files],
        leaks_of,
    )
    task = Task("leaking", (tuple(file.name for file in files), by_file.folder))
    best = run_step(setup.root, "leaking/best", [by_file.key], [task], best_leaks)
    return Finding(best, (by_file, best))


def _image_set(inputs: Inputs, embedded: Embedded, equal: Result | None = None) -> ImageSet:
    """Images as they are compared; `equal`: without those that equal another one."""
    exact = ("", "") if equal is None else (equal.folder, equal.key)
    vectors = embedded.vectors
    return ImageSet(inputs, vectors, exact, visiting if vectors.views else None)


def _looking(setup: Setup, others: Mapping[str, tuple[Inputs, str]] | None = None) -> Looking:
    config = setup.config
    return Looking(setup.images, config.model.in_channels, config.data.max_image_pixels, others)
