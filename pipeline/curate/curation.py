"""What a curation is given and what it gives back. No step changes what it was handed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config.config import Config
from pipeline.curate.choose.balance import Balanced
from pipeline.curate.choose.retrieve import Retrieved
from pipeline.curate.copies.components import LOOKED_EDGES
from pipeline.curate.copies.stored_copies import Copies
from pipeline.curate.decide.tally import Tally
from pipeline.curate.look.looks import counted
from pipeline.curate.rows.file_rows import Tables
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import Inputs, Vectors
from pipeline.curate.sets import Sets
from pipeline.curate.steps.steps import Result
from pipeline.curate.threshold.threshold import Calibration
from pipeline.embed.embedders import EmbedderSpec
from pipeline.uri import Place


@dataclass(frozen=True)
class Setup:
    """What a curation is given; the same for all of its steps.

    Attributes:
        config: the recipe.
        sets: what goes in.
        images: of these sets, all that a decision is made on.
        root: folder of the steps, that all nodes reach.
        gpus: of a task that compares or clusters.
    """

    config: Config
    sets: Sets
    images: Inputs
    root: Place
    gpus: float

    @classmethod
    def of(cls, config: Config, sets: Sets, root: Place) -> Setup:
        """With a GPU for each task that compares, where the Ray cluster has any."""
        import ray

        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
        return cls(config, sets, sets.inputs, root, gpus)


@dataclass(frozen=True)
class Finding:
    """A table about images.

    Attributes:
        table: the step that wrote it.
        steps: all that led to it, itself included.
    """

    table: Result
    steps: tuple[Result, ...]


@dataclass(frozen=True)
class Known:
    """What is known of the images: tables of steps, and their keys.

    What reads all of the tables has all of the keys in its own, so that it runs again when one of
    them has changed.
    """

    tables: Tables = field(default_factory=lambda: Tables(""))
    keys: tuple[tuple[str, str], ...] = ()

    def adding(self, name: str, table: Finding | Result | None) -> Known:
        """With one more table; the name is its field in `Tables`. None: that step was left out."""
        if table is None:
            return self
        result = table.table if isinstance(table, Finding) else table
        folder: Any = result.folder
        if name == "matches":  # a table for each earlier curation
            folder = (*self.tables.matches, folder)
        tables = replace(self.tables, **{name: folder})
        return Known(tables, (*self.keys, (name, result.key)))


@dataclass(frozen=True)
class Embedded:
    """Images as vectors: what made them, where they are, and the steps that it took."""

    spec: EmbedderSpec
    vectors: Vectors
    steps: tuple[Result, ...]


@dataclass(frozen=True)
class OtherSet:
    """A set that the images are compared with and that no decision is made on."""

    name: str
    inputs: Inputs
    prints: Result
    embedded: Embedded

    @property
    def steps(self) -> tuple[Result, ...]:
        """With the name of the set in that of its fingerprints: every set has some."""
        named = replace(self.prints, name=f"fingerprint/{self.name}")
        return (named, *self.embedded.steps)


@dataclass(frozen=True)
class Threshold:
    """Which images are alike enough for a second look.

    Attributes:
        copies: two images are if they are more similar than this.
        leaks: an image and one of an evaluation set.
        penalty: that the similarity of a crop is reduced by.
        calibration: that the threshold comes from; None where it was given.
        steps: of the calibration.
    """

    copies: float
    leaks: float
    penalty: float
    calibration: Calibration | None = None
    steps: tuple[Result, ...] = ()


@dataclass(frozen=True)
class Leaks(Finding):
    """Images that show the same as one of an evaluation set.

    Attributes:
        prints: by name of an evaluation set, the folder of its fingerprints.
        leaked: how many of its images have a match, where any has.
    """

    prints: dict[str, str]
    leaked: dict[str, int]


@dataclass(frozen=True)
class Comparison:
    """What came of comparing images.

    Attributes:
        embedded: vectors that images were compared by.
        threshold: above which two were looked at.
        earlier: copies of images of each earlier curation.
        pairs: of images of the set that are alike.
        leaks: of evaluation sets; None without these.
        groups: of copies, with a keeper each; None where the recipe keeps copies.
        leaking: groups that go as a whole; None where only images go.
    """

    embedded: Embedded
    threshold: Threshold
    earlier: tuple[Finding, ...]
    pairs: Copies
    leaks: Leaks | None
    groups: Finding | None
    leaking: Finding | None

    @property
    def steps(self) -> Iterator[Result]:
        """All of them, in order."""
        yield from (*self.embedded.steps, *self.threshold.steps)
        for earlier in self.earlier:
            yield from earlier.steps
        yield from self.pairs.steps
        for finding in (self.leaks, self.groups, self.leaking):
            yield from finding.steps if finding else ()

    @property
    def looks(self) -> dict[str, dict[str, int]]:
        """By what was compared: pairs that got the second look, and what it said."""
        return {
            result.step.removesuffix("/looked").removesuffix("/looks"): counted(result)
            for result in self.steps
            if result.step.endswith("/looked")
        }


@dataclass(frozen=True)
class Seeds:
    """Images that others are retrieved by.

    Attributes:
        rows: vectors of each set, by its name.
        prints: folders of the fingerprints.
        steps: of the sets that are not curated themselves.
    """

    rows: dict[str, RowSet]
    prints: dict[str, str]
    steps: tuple[Result, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What retrieval and balance chose.

    Attributes:
        left: images that they chose from.
        content: vectors that say what images show.
        seeds: images of the seed sets; empty without these.
        retrieved: what these asked for.
        balanced: the balanced sample.
    """

    left: Result
    content: Embedded
    seeds: Seeds
    retrieved: Retrieved | None
    balanced: Balanced | None

    @property
    def steps(self) -> Iterator[Result]:
        """All of them, in order."""
        yield from (self.left, *self.content.steps, *self.seeds.steps)
        for chosen in (self.retrieved, self.balanced):
            if chosen:
                yield chosen.result


@dataclass(frozen=True)
class Decisions(Finding):
    """One decision for each image, and their counts."""

    tally: Tally


@dataclass(frozen=True)
class Curation:
    """A finished curation: what its steps have found, in their order; None where one was off."""

    setup: Setup
    prints: Result
    marks: Result | None
    equal: Result
    comparison: Comparison | None
    choice: Choice | None
    decisions: Decisions

    @property
    def results(self) -> list[Result]:
        """Of all steps, in order."""
        first = [self.prints, *([self.marks] if self.marks else []), self.equal]
        compared = self.comparison.steps if self.comparison else ()
        chosen = self.choice.steps if self.choice else ()
        return [*first, *compared, *chosen, *self.decisions.steps]

    @property
    def folders(self) -> dict[str, str]:
        """Where the tables are that the report reads, by name (`report.read.NAMES`)."""
        tables = {"fingerprint": self.prints, "quality": self.marks, "exact": self.equal}
        folders = {name: table.folder for name, table in tables.items() if table}
        if self.comparison and self.comparison.leaks:
            folders["leaks"] = self.comparison.leaks.table.folder
        if self.comparison and self.comparison.groups:
            groups = self.comparison.groups
            folders["edges"] = self.comparison.pairs.edges
            folders["components"] = groups.table.folder
            folders["looks"] = next(s.folder for s in groups.steps if s.step == LOOKED_EDGES)
        if self.choice and self.choice.retrieved:
            folders["retrieved"] = self.choice.retrieved.result.folder
        if self.choice and self.choice.balanced:
            folders["balanced"] = self.choice.balanced.result.folder
        return folders | {"decisions": self.decisions.table.folder}

    @property
    def numbers(self) -> dict[str, Any]:
        """Of leaks, second looks, retrieval and balance, for the result of the stage."""
        numbers: dict[str, Any] = {}
        if self.comparison and self.comparison.leaks:
            numbers["leaked"] = self.comparison.leaks.leaked
        if self.comparison and self.comparison.groups:
            numbers["looks"] = self.comparison.looks
        if self.choice and self.choice.retrieved:
            numbers["retrieved"] = self.choice.retrieved.summary
        if self.choice and self.choice.balanced:
            summary = self.choice.balanced.summary
            long = ("sizes_before", "sizes_after")
            numbers["balanced"] = {k: v for k, v in summary.items() if k not in long}
        return numbers
