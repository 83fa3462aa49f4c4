"""What the steps of a curation share: what they have found, and how images become vectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.config import Config
from pipeline.curate.decide.tally import Tally
from pipeline.curate.embed.embed import embed
from pipeline.curate.embed.embedders import DESCRIPTOR, EmbedderSpec
from pipeline.curate.images import exact_copies, fingerprint
from pipeline.curate.rows.file_rows import Tables
from pipeline.curate.rows.tables import Inputs, Vectors
from pipeline.curate.sets import Sets
from pipeline.curate.steps.steps import Result
from pipeline.curate.threshold.threshold import Calibration
from pipeline.uri import Place


@dataclass
class Found:
    """What the steps have found so far.

    Attributes:
        config: the recipe.
        sets: what goes in.
        inputs: the images that decisions are made on.
        root: folder of the steps, that all nodes reach.
        gpus: of a task that compares or clusters.
        results: of all steps, in order.
        folders: of the tables, by name (`report_read.NAMES`).
        keys: of the steps that decisions are made from.
        tables: where those are.
        leak_prints: folder of the fingerprints of each evaluation set.
        seed_prints: of each seed set.
        copy_spec: what makes the vectors that find copies.
        copy_vectors: these.
        calibration: where a threshold was to be calibrated.
        threshold: above which two images are copies.
        leak_threshold: above which one is a copy of an image of an evaluation set.
        penalty: that the similarity of a crop is reduced by.
        numbers: of retrieval and balance, for the result.
        tally: of the decisions.
    """

    config: Config
    sets: Sets
    inputs: Inputs
    root: Place
    gpus: float = 0.0
    results: list[Result] = field(default_factory=list)
    folders: dict[str, str] = field(default_factory=dict)
    keys: list[Any] = field(default_factory=list)
    tables: Tables = field(default_factory=lambda: Tables(""))
    leak_prints: dict[str, str] = field(default_factory=dict)
    seed_prints: dict[str, str] = field(default_factory=dict)
    copy_spec: EmbedderSpec | None = None
    copy_vectors: Vectors | None = None
    calibration: Calibration | None = None
    threshold: float | None = None
    leak_threshold: float | None = None
    penalty: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)
    tally: Tally | None = None

    def add(self, result: Result, name: str = "", steps: Iterable[Result] = ()) -> Result:
        """Notes a step (or the `steps` it is made of) and, with a name, that it made a table of
        which decisions are made.
        """
        self.results += [*steps] or [result]
        if name:
            self.folders[name] = result.folder
            self.tables = Tables(**{**vars(self.tables), name: result.folder})
            self.keys.append([name, result.key])
        return result

    @property
    def decisions(self) -> Result:
        """The step that made them."""
        return next(result for result in reversed(self.results) if result.step == "decisions")

    @property
    def counted(self) -> Tally:
        """The tally, which is there once decisions are made."""
        assert self.tally is not None
        return self.tally


def fingerprints(found: Found, root: Place, inputs: Inputs) -> Result:
    """Decodes all images of some inputs; the step is noted by who calls this."""
    data = found.config.data
    return fingerprint.fingerprint(
        root,
        inputs,
        max_pixels=data.max_image_pixels,
        channels=found.config.model.in_channels,
    )


def vectors_of(
    found: Found,
    root: Place,
    step: str,
    inputs: Inputs,
    prints: Result,
    spec: EmbedderSpec,
) -> Vectors:
    """Vectors of the images of some inputs: all that can be decoded, of equal ones that are curated
    the one that is kept.

    Which that is depends on no threshold, so another one embeds nothing again: who reads the
    vectors leaves out what earlier steps did.
    """
    distinct = None
    if inputs is found.inputs and spec.kind != DESCRIPTOR:
        distinct = exact_copies.collapse(root, inputs, prints, step="distinct")
        if all(result.step != distinct.step for result in found.results):
            found.add(distinct)
    vectors, result = embed(
        root,
        step,
        inputs,
        distinct,
        spec,
        fingerprints=prints,
        max_pixels=found.config.data.max_image_pixels,
        channels=found.config.model.in_channels,
    )
    if result.step != prints.step:
        found.add(result)
    return vectors
