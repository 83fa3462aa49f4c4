"""What a card holds: sets, contenders with their scores, and the verdict; as JSON and back.

What each image adds to each score is in a parquet file beside it, so that the models of two cards
can be compared on the same images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.evaluate.score import Interval, Score

VERSION = 1

Role = Literal["model", "step0", "init", "untrained", "raw_pixels", "colours", "majority"]
BASELINES: dict[Role, str] = {
    "step0": "the same network at step 0",
    "init": "what the run started from",
    "untrained": "the same architecture with random weights",
    "raw_pixels": "raw pixels (16 x 16)",
    "colours": "a colour histogram",
    "majority": "the most frequent class",
}


@dataclass(frozen=True)
class SetFacts:
    """One set of images that scores are of.

    Attributes:
        name: as the user gave it.
        digest: of the images.
        images: how many could be decoded.
        labelled: of these, how many have a label.
        class_names: of all classes; empty where labels are numbers.
    """

    name: str
    digest: str
    images: int
    labelled: int
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """One score of one contender.

    Attributes:
        score: with what each image adds; None where it is of no images (`rank_me`) and has no
            interval.
        interval: value with both ends; equal ends where there is no interval.
        details: what else is worth saying: which head of the grid, each attack, IoU of each class.
    """

    score: Score | None
    interval: Interval
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, score: Score, **details: Any) -> Result:
        """With its interval by the bootstrap."""
        return cls(score, score.interval(), details)

    @classmethod
    def alone(cls, value: float, **details: Any) -> Result:
        """A number without an interval."""
        return cls(None, Interval(value, value, value), details)


@dataclass(frozen=True)
class Contender:
    """One model, or one baseline, with all its scores.

    Attributes:
        role: `model`, or which baseline.
        name: for people: `runs/photos (step 1,600)`, `raw pixels (16 x 16)`.
        of: the name of the model that a step 0, init or untrained baseline belongs to, else "".
        results: by score name, in the order in which they are shown.
        facts: digest, image_size, dim, precision, step and such, where there are any.
        cost: seconds by what they were spent on, `embed`, `knn20_top1` …
    """

    role: Role
    name: str
    of: str = ""
    results: Mapping[str, Result] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)

    @property
    def start(self) -> str:
        """The weights that its training began with, as they were named; "": random ones."""
        return str(self.facts.get("started_from", ""))

    @property
    def best_of(self) -> int:
        """Evaluations, on the queries of the card and by its score, that a model is the best of."""
        return int(self.facts.get("best_of", 1))


@dataclass(frozen=True)
class Verdict:
    """What a person can do with the card.

    Attributes:
        rule: its name in `verdict.py`, `learnt`, `no_better_than_colours` …; "" where no verdict
            is allowed.
        text: one or two sentences.
    """

    rule: str
    text: str


@dataclass(frozen=True)
class Confusion:
    """Which classes are taken for which: of few classes all, of many the most frequent answers.

    Attributes:
        images: that were asked, of each class.
        right: of these, of each class.
        wrong: (truth, answer, images), the most frequent first. With many classes: the most
            frequent wrong answer of each class, and the most frequent ones of all.
    """

    images: tuple[int, ...] = ()
    right: tuple[int, ...] = ()
    wrong: tuple[tuple[int, int, int], ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether all wrong answers are there."""
        return sum(self.images) == sum(self.right) + sum(count for _, _, count in self.wrong)


@dataclass(frozen=True)
class Card:
    """An evaluation card.

    Attributes:
        title: of the page.
        made: date and time in UTC, ISO 8601.
        score: the name of the score that decides.
        reference: the labelled set that votes, or the only set.
        queries: the set that is asked; None: leave-one-out on the reference.
        contenders: models first, then baselines.
        verdict: by the rules in `verdict.py`.
        remarks: what the sets share and lack, what was skipped and why.
        settings: all that the scores depend on beside models and images; cards with other ones are
            not compared.
        confusion: of the main model; empty without labels.
        wrong: wrong answers of the main model that are worth a look: the surest first, then some
            of the most frequent ones; see `WrongAnswer`.
    """

    title: str
    made: str
    score: str
    reference: SetFacts
    queries: SetFacts | None
    contenders: tuple[Contender, ...]
    verdict: Verdict = Verdict("", "")
    remarks: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    confusion: Confusion = field(default_factory=Confusion)
    wrong: tuple[WrongAnswer, ...] = ()


@dataclass(frozen=True)
class WrongAnswer:
    """A query that its neighbours classify wrong.

    Attributes:
        query: image id, 32 hex digits.
        truth: its class number.
        answer: the class that won.
        votes: share of the votes that it won with, 0 to 1.
        neighbours: (image id, class number, cosine) of the nearest reference images, best first.
    """

    query: str
    truth: int
    answer: int
    votes: float
    neighbours: tuple[tuple[str, int, float], ...] = ()
