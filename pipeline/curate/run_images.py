"""The steps of a curation that look at images one by one, or at equal ones, and make vectors."""

from __future__ import annotations

from pipeline.config.config import Config
from pipeline.curate.curation import OtherSet, Setup
from pipeline.curate.embed.embed import Embedded, embed
from pipeline.curate.images.equal_images import equal_images
from pipeline.curate.images.fingerprint import fingerprint
from pipeline.curate.images.quality import Rules, quality
from pipeline.curate.rows.tables import Inputs
from pipeline.curate.steps.steps import Step, Steps
from pipeline.embed.embedders import DESCRIPTOR, EmbedderSpec


def fingerprint_images(setup: Setup) -> Step:
    """Decodes every image, once: hashes, measures, descriptor, thumbnail."""
    return fingerprint(setup.steps, setup.images, setup.decoding)


def mark_quality(setup: Setup, prints: Step) -> Step:
    """Marks the images that fail a rule of `quality`."""
    return quality(setup.steps, setup.images, prints, rules(setup.config))


def find_equal(setup: Setup, prints: Step, marks: Step | None) -> Step:
    """Of images with equal bytes or equal pixels, which one stays."""
    return equal_images(setup.steps, setup.images, prints, marks)


def rules(config: Config) -> Rules:
    """The limits of the quality rules."""
    return Rules(**config.quality.model_dump(exclude={"enabled", "sample"}))


def embed_images(setup: Setup, name: str, prints: Step, spec: EmbedderSpec) -> Embedded:
    """Vectors of the curated images: of equal ones, the one that is kept.

    Which that is depends on no threshold, so another one embeds nothing again: who reads the
    vectors leaves out what earlier steps did.
    """
    distinct = None
    if spec.kind != DESCRIPTOR:  # that is in the fingerprints, of all images
        distinct = equal_images(setup.steps, setup.images, prints, name="distinct")
    return embed(setup.steps, name, setup.images, spec, prints, setup.decoding, distinct)


def open_other_set(
    setup: Setup, steps: Steps, inputs: Inputs, name: str, spec: EmbedderSpec
) -> OtherSet:
    """Decodes and embeds a set that no decision is made on.

    Args:
        setup: of the curation.
        steps: of the set.
        inputs: its images.
        name: of the step that embeds.
        spec: what makes the vectors.
    """
    prints = fingerprint(steps, inputs, setup.decoding)
    return OtherSet(inputs, prints, embed(steps, name, inputs, spec, prints, setup.decoding))
