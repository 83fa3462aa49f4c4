"""The steps of a curation that compare images: threshold, copies, leaks, earlier curations."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config.config import Config
from pipeline.curate.copies import leaks, matches, pairs, which_are_copies
from pipeline.curate.copies.cell_items import ImageSet
from pipeline.curate.copies.keepers import CopyRule
from pipeline.curate.copies.pairs import Index, Pairs, Search
from pipeline.curate.curation import Leaks, Setup, Threshold
from pipeline.curate.decide.file_rows import Known
from pipeline.curate.earlier import check_inputs
from pipeline.curate.embed.embed import Embedded
from pipeline.curate.images.descriptor import visiting
from pipeline.curate.images.equal_images import kept_count
from pipeline.curate.look.look_at_pairs import Looking
from pipeline.curate.models import embedder_of
from pipeline.curate.report.copies import FAR
from pipeline.curate.rows.tables import POOL, Inputs
from pipeline.curate.run_images import embed_images, open_other_set
from pipeline.curate.steps.steps import Step
from pipeline.curate.threshold.calibrate import Sampling, calibrate
from pipeline.curate.threshold.threshold import DEFAULT_PENALTY
from pipeline.errors import DataError
from pipeline.uri import public

FALSE_PAIRS = 0.01  # of the images, that are in a pair that is wrongly taken for copies
MOST_FALSE = 1e-6  # share of the pairs
BELOW = 0.1  # so far below the threshold pairs are kept too, so that the report can show them


def embed_for_copies(setup: Setup, prints: Step) -> Embedded:
    """The vectors that copies are found by."""
    config = setup.config
    spec = embedder_of(config, "curate.copy_embedder", config.curate.copy_embedder)
    return embed_images(setup, "embed_copy", prints, spec)


def find_threshold(setup: Setup, prints: Step, equal: Step, embedded: Embedded) -> Threshold:
    """The similarity above which two images get a second look.

    It is that of the earlier curation that these images are added to; else that of the recipe; else
    it is calibrated on a sample.

    Raises:
        DataError: similarities do not mean the same as in the earlier curation.
    """
    config, spec, calibration = setup.config, embedded.spec, None
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
        threshold, penalty = (float(latest.result[name]) for name in ("threshold", "penalty"))
    elif config.dedup.threshold != "auto":
        threshold = float(config.dedup.threshold)
    else:
        target = false_positives(config, kept_count(equal))
        sampling = Sampling(config.dedup.calibration_images, target, config.run.seed)
        calibration = calibrate(
            setup.steps, setup.images, prints, equal, embedded, sampling, setup.decoding
        )
        threshold, penalty = float(calibration.threshold), calibration.penalty
    chosen = config.leaks.threshold
    leaks_above = threshold if chosen == "auto" else float(chosen)
    return Threshold(threshold, leaks_above, penalty, calibration)


def false_positives(config: Config, images: int) -> float:
    """Share of unlike pairs that may be taken for copies.

    n images have n² / 2 pairs, so a share fit for thousands of images is not for millions. With
    0.01 / n one image in a hundred is in a false pair, and one in two hundred is lost by it.
    """
    share = config.dedup.false_positives
    return share if share != "auto" else min(MOST_FALSE, FALSE_PAIRS / max(1, images))


def match_earlier(
    setup: Setup, equal: Step, embedded: Embedded, threshold: Threshold
) -> tuple[Step, ...]:
    """Copies of images that were curated earlier: a table for each of the earlier curations."""
    shards = setup.sets.earlier_shards
    others = (
        {matches.EARLIER: (Inputs.of([(matches.EARLIER, POOL, shards)]), None)} if shards else {}
    )
    return tuple(
        matches.find_matches(
            setup.steps.below("against", f"{number:03d}"),
            Index.open(earlier.root),
            _image_set(setup.images, embedded, equal),
            earlier.decisions(),
            threshold.copies,
            _looking(setup, others),
            setup.gpus,
        )
        for number, earlier in enumerate(setup.sets.earlier)
    )


def put_in_cells(setup: Setup, equal: Step, embedded: Embedded, threshold: Threshold) -> Index:
    """The images in the buckets of their cells, in which all that follows is compared."""
    images = _image_set(setup.images, embedded, equal)
    return pairs.put_in_cells(setup.steps, images, _search(setup, threshold))


def find_leaks(setup: Setup, index: Index, embedded: Embedded, threshold: Threshold) -> Leaks:
    """Images that show the same as an image of an evaluation set."""
    others = {}
    for name, shards in setup.sets.leaks.items():
        steps = setup.steps.below("sets", f"leaks-{name}", label=name)
        inputs = Inputs.of([(name, POOL, shards)])
        others[name] = open_other_set(setup, steps, inputs, "embed_copy", embedded.spec)
    table, leaked = leaks.find_leaks(
        setup.steps,
        index,
        setup.images,
        {name: _image_set(other.inputs, other.embedded) for name, other in others.items()},
        threshold.leaks,
        _looking(setup, {name: (other.inputs, other.prints) for name, other in others.items()}),
        setup.gpus,
    )
    return Leaks(table, {name: other.prints.folder for name, other in others.items()}, leaked)


def find_pairs(setup: Setup, index: Index, threshold: Threshold) -> Pairs:
    """Pairs of images that are alike, also some that are a little less so, for the report."""
    search = _search(setup, threshold)
    lowest, suffices = (max(0.0, threshold.copies - less) for less in (BELOW, FAR))
    return pairs.find_pairs(setup.steps, index, search, lowest, suffices)


def group_copies(
    setup: Setup, alike: Pairs, known: Known, embedded: Embedded, threshold: Threshold
) -> Step:
    """Groups of copies, with the one that stays of each: none that goes in any case."""
    dedup = setup.config.dedup
    return which_are_copies.group_copies(
        setup.steps,
        alike,
        _image_set(setup.images, embedded),
        known.prints,
        CopyRule(threshold.copies, dedup.guard, dedup.chains),
        [*known.matches, *([known.leaks] if known.leaks else [])],
        _looking(setup),
    )


def leaking_groups(setup: Setup, known: Known) -> Step:
    """Groups of copies of which an image leaks, with the best leak: the whole group goes."""
    assert known.leaks and known.groups
    return leaks.leaking_groups(setup.steps, setup.images, known.prints, known.leaks, known.groups)


def _search(setup: Setup, threshold: Threshold) -> Search:
    dedup, seed = setup.config.dedup, setup.config.run.seed
    return Search(dedup.probes, dedup.cell_images, threshold.penalty, seed, setup.gpus)


def _image_set(inputs: Inputs, embedded: Embedded, equal: Step | None = None) -> ImageSet:
    """Images as they are compared; `equal`: without those that equal another one."""
    vectors = embedded.vectors
    return ImageSet(inputs, vectors, equal, visiting if vectors.views else None)


def _looking(
    setup: Setup, others: Mapping[str, tuple[Inputs, Step | None]] | None = None
) -> Looking:
    return Looking(setup.images, setup.decoding, others or {})
