"""The steps of a curation that look at images one by one, or at equal ones, and make vectors."""

from __future__ import annotations

from pipeline.config.config import Config
from pipeline.curate.curation import Embedded, OtherSet, Setup
from pipeline.curate.embed.embed import embed
from pipeline.curate.images import exact_copies, fingerprint, quality
from pipeline.curate.images.quality import Rules
from pipeline.curate.rows.tables import Inputs
from pipeline.curate.steps.steps import Result
from pipeline.embed.embedders import DESCRIPTOR, EmbedderSpec
from pipeline.uri import Place


def fingerprint_images(setup: Setup) -> Result:
    """Decodes every image, once: hashes, measures, descriptor, thumbnail."""
    return _fingerprint(setup, setup.root, setup.images)


def mark_quality(setup: Setup, prints: Result) -> Result:
    """Marks the images that fail a rule of `quality`."""
    return quality.quality(setup.root, setup.images, prints, rules(setup.config))


def find_equal(setup: Setup, prints: Result, marks: Result | None) -> Result:
    """Of images with equal bytes or equal pixels, which one stays."""
    return exact_copies.collapse(setup.root, setup.images, prints, marks)


def rules(config: Config) -> Rules:
    """The limits of the quality rules."""
    return Rules(**config.quality.model_dump(exclude={"enabled", "sample"}))


def embed_images(setup: Setup, step: str, prints: Result, spec: EmbedderSpec) -> Embedded:
    """Vectors of the curated images: of equal ones, the one that is kept.

    Which that is depends on no threshold, so another one embeds nothing again: who reads the
    vectors leaves out what earlier steps did.
    """
    if spec.kind == DESCRIPTOR:  # it is in the fingerprints, of all images
        return _embed(setup, setup.root, step, setup.images, prints, spec)
    distinct = exact_copies.collapse(setup.root, setup.images, prints, step="distinct")
    return _embed(setup, setup.root, step, setup.images, prints, spec, distinct)


def open_other_set(
    setup: Setup, name: str, root: Place, inputs: Inputs, step: str, spec: EmbedderSpec
) -> OtherSet:
    """Decodes and embeds a set that no decision is made on.

    Args:
        setup: of the curation.
        name: of the set.
        root: folder of its steps.
        inputs: its images.
        step: name of the step that embeds.
        spec: what makes the vectors.
    """
    prints = _fingerprint(setup, root, inputs)
    return OtherSet(name, inputs, prints, _embed(setup, root, step, inputs, prints, spec))


def _fingerprint(setup: Setup, root: Place, inputs: Inputs) -> Result:
    config = setup.config
    return fingerprint.fingerprint(
        root,
        inputs,
        max_pixels=config.data.max_image_pixels,
        channels=config.model.in_channels,
    )


def _embed(
    setup: Setup,
    root: Place,
    step: str,
    inputs: Inputs,
    prints: Result,
    spec: EmbedderSpec,
    distinct: Result | None = None,
) -> Embedded:
    vectors, result = embed(
        root,
        step,
        inputs,
        distinct,
        spec,
        fingerprints=prints,
        max_pixels=setup.config.data.max_image_pixels,
        channels=setup.config.model.in_channels,
    )
    steps = [distinct] if distinct else []
    if result.step != prints.step:
        steps.append(result)
    return Embedded(spec, vectors, tuple(steps))
