"""What a curation is given and what it gives back. No step changes what it was handed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.config import Config
from pipeline.curate.choose.balance import Balanced
from pipeline.curate.choose.retrieve import Retrieved
from pipeline.curate.copies.pairs import Pairs
from pipeline.curate.copies.which_are_copies import LOOKED_EDGES
from pipeline.curate.decide.file_rows import Known
from pipeline.curate.decide.tally import Tally
from pipeline.curate.embed.embed import Embedded
from pipeline.curate.images.fingerprint import Decoding
from pipeline.curate.look.look_at_pairs import counted
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import Inputs
from pipeline.curate.sets import Sets
from pipeline.curate.steps.steps import Step, Steps
from pipeline.curate.threshold.threshold import Calibration
from pipeline.uri import Place


@dataclass(frozen=True)
class Setup:
    """What a curation is given; the same for all of its steps.

    Attributes:
        config: the recipe.
        sets: what goes in.
        images: of these sets, all that a decision is made on.
        steps: that have been run, and where they are.
        gpus: of a task that compares or clusters.
    """

    config: Config
    sets: Sets
    images: Inputs
    steps: Steps
    gpus: float

    @classmethod
    def of(cls, config: Config, sets: Sets, root: Place) -> Setup:
        """With a GPU for each task that compares, where the Ray cluster has any."""
        import ray

        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
        return cls(config, sets, sets.inputs, Steps(root), gpus)

    @property
    def decoding(self) -> Decoding:
        """How images are decoded: as the training does."""
        return Decoding(self.config.model.in_channels, self.config.data.max_image_pixels)


@dataclass(frozen=True)
class OtherSet:
    """A set that the images are compared with and that no decision is made on."""

    inputs: Inputs
    prints: Step
    embedded: Embedded


@dataclass(frozen=True)
class Threshold:
    """Which images are alike enough for a second look.

    Attributes:
        copies: two images are if they are more similar than this.
        leaks: an image and one of an evaluation set.
        penalty: that the similarity of a crop is reduced by.
        calibration: that the threshold comes from; None where it was given.
    """

    copies: float
    leaks: float
    penalty: float
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Leaks:
    """Images that show the same as one of an evaluation set.

    Attributes:
        table: which, and as which.
        prints: by name of an evaluation set, the folder of its fingerprints.
        leaked: how many of its images have a match, where any has.
    """

    table: Step
    prints: dict[str, str]
    leaked: dict[str, int]


@dataclass(frozen=True)
class Comparison:
    """What came of comparing images.

    Attributes:
        embedded: vectors that images were compared by.
        threshold: above which two were looked at.
        leaks: of evaluation sets; None without these.
        pairs: of images of the set that are alike; None where the recipe keeps copies.
    """

    embedded: Embedded
    threshold: Threshold
    leaks: Leaks | None
    pairs: Pairs | None


@dataclass(frozen=True)
class Seeds:
    """Images that others are retrieved by.

    Attributes:
        rows: vectors of each set, by its name.
        prints: folders of the fingerprints.
    """

    rows: dict[str, RowSet]
    prints: dict[str, str]


@dataclass(frozen=True)
class Choice:
    """What retrieval and balance chose.

    Attributes:
        seeds: images of the seed sets; empty without these.
        retrieved: what these asked for.
        balanced: the balanced sample.
    """

    seeds: Seeds
    retrieved: Retrieved | None
    balanced: Balanced | None


@dataclass(frozen=True)
class Decisions:
    """One decision for each image, and their counts."""

    table: Step
    tally: Tally


@dataclass(frozen=True)
class Curation:
    """A finished curation: what its steps have found, in their order; None where one was off."""

    setup: Setup
    known: Known
    comparison: Comparison | None
    choice: Choice | None
    decisions: Decisions

    @property
    def results(self) -> list[Step]:
        """All steps, in order."""
        return self.setup.steps.done

    @property
    def folders(self) -> dict[str, str]:
        """Where the tables are that the report reads, by name (`report.read.NAMES`)."""
        known, pairs = self.known, self.comparison.pairs if self.comparison else None
        looks = [step for step in self.results if step.name == LOOKED_EDGES]
        tables = {
            "fingerprint": known.prints,
            "quality": known.marks,
            "exact": known.equal,
            "leaks": known.leaks,
            "edges": pairs.edges if pairs else None,
            "components": known.groups,
            "looks": looks[0] if looks else None,
            "retrieved": known.retrieved,
            "balanced": known.balanced,
            "decisions": self.decisions.table,
        }
        return {name: table.folder for name, table in tables.items() if table}

    @property
    def looks(self) -> dict[str, dict[str, int]]:
        """By what was compared: pairs that got the second look, and what it said."""
        return {
            step.name.removesuffix("/looked").removesuffix("/looks"): counted(step)
            for step in self.results
            if step.name.endswith("/looked")
        }

    @property
    def numbers(self) -> dict[str, Any]:
        """Of leaks, second looks, retrieval and balance, for the result of the stage."""
        numbers: dict[str, Any] = {}
        if self.comparison and self.comparison.leaks:
            numbers["leaked"] = self.comparison.leaks.leaked
        if self.known.groups:
            numbers["looks"] = self.looks
        if self.choice and self.choice.retrieved:
            numbers["retrieved"] = self.choice.retrieved.summary
        if self.choice and self.choice.balanced:
            summary = self.choice.balanced.summary
            long = ("sizes_before", "sizes_after")
            numbers["balanced"] = {k: v for k, v in summary.items() if k not in long}
        return numbers
