"""What the rules of the verdict ask of a card: gains with their intervals, and facts beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist

from pipeline.card.card import Card, Contender, Role
from pipeline.card.words import (
    UNLABELLED,
    is_lower_better,
    rounded,
    short_of,
    title_of,
    with_margin,
)
from pipeline.evaluate.health import MIN_EFFECTIVE_RANK, MIN_FEATURE_STD
from pipeline.evaluate.score import LEVEL, Interval, Score, difference

TELLING = (
    0.05  # a gain that is not worth missing: an interval wider than this to each side tells nothing
)
START: tuple[Role, ...] = ("step0", "untrained")
SIMPLE: tuple[Role, ...] = ("colours", "raw_pixels", "majority")


@dataclass(frozen=True)
class ModelFacts:
    """What the verdict needs to know of a model beside its scores.

    Attributes:
        training_images: that it was trained on by us; 0 where that is unknown.
        alarm: the sentence of `evaluate.health.alarm`, where it has one.
        passes: over these images; 0 where that is unknown.
    """

    training_images: int = 0
    alarm: str = ""
    passes: float = 0.0


@dataclass(frozen=True)
class Facts:
    """What the verdict needs to know beside the card.

    Attributes:
        models: facts by the name of the model (`Contender.name`).
        shared: labelled queries that are also in the reference.
        vectors_only: only vectors were given, so there are no pixels and no untrained network.
        missing: why the card lacks the score that decides, where it does.
    """

    models: Mapping[str, ModelFacts] = field(default_factory=dict)
    shared: int = 0
    vectors_only: bool = False
    missing: str = ""


@dataclass(frozen=True)
class Gain:
    """By how much one contender is better than another, whichever way the score goes.

    Attributes:
        interval: of the difference; above 0: better. Its ends allow for evaluations that the
            contenders are the best of.
        single: as if each had been evaluated once.
        scale: of what a difference is a share: 1 for shares, the other's value for errors.
        images: n of both.
    """

    interval: Interval
    single: Interval
    scale: float
    images: int

    @property
    def is_better(self) -> bool:
        """Beyond the interval."""
        return self.interval.low > 0

    @property
    def is_worse(self) -> bool:
        """Beyond the interval."""
        return self.interval.high < 0

    @property
    def is_little(self) -> bool:
        """Better, but surely by less than is worth missing."""
        return self.is_better and self.interval.high < TELLING * self.scale

    @property
    def is_none(self) -> bool:
        """Neither, and the interval is narrow enough to say so."""
        return not (self.is_better or self.is_worse or self.is_unclear)

    @property
    def is_unclear(self) -> bool:
        """Neither, and a gain worth having could hide in the interval."""
        interval = self.interval
        wider = max(interval.value - interval.low, interval.high - interval.value)
        # what one evaluation alone would call better or worse is not as good either
        return interval.holds_0 and (wider > TELLING * self.scale or not self.single.holds_0)

    @property
    def margin(self) -> float:
        """What stands after the plus-minus sign. Where one is the best of several evaluations, the
        sides differ: then the one towards 0, on which the claim rests.
        """
        interval = self.interval
        if interval == self.single:
            return interval.margin
        towards_0 = interval.low if interval.value >= 0 else interval.high
        return abs(interval.value - towards_0)

    @property
    def shown(self) -> Interval:
        """As wide to both sides."""
        value, margin = self.interval.value, self.margin
        return Interval(value, value - margin, value + margin)

    @property
    def needed(self) -> float:
        """Images that would tell: a margin falls with the root of their number."""
        value = abs(self.interval.value)
        worth = max(value, TELLING * self.scale) if self.single.holds_0 else value
        return max(1.0, self.images * (self.margin / worth) ** 2)


@dataclass(frozen=True)
class Case:
    """A card and its facts, with one of its models as the one that is judged."""

    card: Card
    facts: Facts

    @cached_property
    def models(self) -> list[Contender]:
        """Those with the score that decides, the best first."""
        scored = [one for one in self.card.contenders if one.role == "model" and self.has(one)]
        sign = 1 if is_lower_better(self.card.score) else -1
        return sorted(scored, key=lambda one: sign * one.results[self.card.score].interval.value)

    def has(self, one: Contender) -> bool:
        """Whether a contender has the score that decides, of images and against a truth."""
        result = None if self.card.score in UNLABELLED else one.results.get(self.card.score)
        return result is not None and result.score is not None

    @property
    def best(self) -> Contender:
        """The model that is judged."""
        return self.models[0]

    @property
    def about_best(self) -> ModelFacts:
        """Facts of the model that is judged."""
        return self.facts.models.get(self.best.name, ModelFacts())

    def score(self, one: Contender) -> Score:
        """Of a contender that has it."""
        score = one.results[self.card.score].score
        assert score is not None
        return score

    def interval(self, one: Contender) -> Interval:
        """Of a contender's score that decides."""
        return one.results[self.card.score].interval

    @property
    def images(self) -> int:
        """n, of the score that decides."""
        return len(self.score(self.best).ids)

    def baseline(self, *roles: Role) -> Contender | None:
        """The first of these that belongs to the best model and is of the same images."""
        same = self.score(self.best).images
        for role in roles:
            for one in self.card.contenders:
                ours = one.role == role and one.of in ("", self.best.name)
                if ours and self.has(one) and self.score(one).images == same:
                    return one
        return None

    @cached_property
    def start(self) -> Contender | None:
        """The network before it was trained."""
        return self.baseline(*START)

    @cached_property
    def init(self) -> Contender | None:
        """What the run started from, where that were weights."""
        return self.baseline("init", *(START[:1] if self.best.start else ()))

    @cached_property
    def simple(self) -> Contender | None:
        """The best of what needs no network."""
        known = [one for role in SIMPLE if (one := self.baseline(role))]
        sign = -1 if is_lower_better(self.card.score) else 1
        return max(known, key=lambda one: sign * self.interval(one).value, default=None)

    def gain(self, other: Contender, over: Contender | None = None, level: float = LEVEL) -> Gain:
        """Of the best model, or of `over`, against another, on the same images."""
        one = over or self.best
        pair = (one.role, one.name, other.role, other.name, level)
        if pair not in self._gains:
            best_of = one.best_of, other.best_of
            self._gains[pair] = gain(self.score(one), self.score(other), best_of, level)
        return self._gains[pair]

    @cached_property
    def _gains(self) -> dict[tuple[object, ...], Gain]:
        """Those that were asked for: of a mean average precision one takes seconds."""
        return {}

    def untelling(self) -> list[tuple[Contender, Gain]]:
        """What the best model might be better than, and the images are too few to tell."""
        others = [one for one in (self.init, self.start, self.simple) if one]
        gains = [(one, self.gain(one)) for one in others]
        return [(one, gain) for one, gain in gains if gain.is_unclear]

    @property
    def is_labelled(self) -> bool:
        """Whether there are labels, of both sets where there are two."""
        sets = [self.card.reference, *([self.card.queries] if self.card.queries else [])]
        return all(one.labelled for one in sets)

    def alarm(self, one: Contender) -> str:
        """That of a model's run, or by the spread and the rank of its vectors; or ""."""
        if alarm := self.facts.models.get(one.name, ModelFacts()).alarm:
            return alarm
        if one.facts.get("step") == 0:  # features at step 0 hardly differ by nature
            return ""
        limits = (("feature_std", MIN_FEATURE_STD), ("effective_rank", MIN_EFFECTIVE_RANK))
        for name, limit in limits:
            if name in one.results and one.results[name].interval.value < limit:
                return (
                    f"{title_of(name)} is {one.results[name].interval.value:.2g}, below {limit:g}: "
                    "the vectors hardly tell images apart; take other weights, or train again with "
                    "a lower optim.lr or a longer optim.warmup."
                )
        return ""

    def said(self) -> str:
        """`k-NN 0.74 ± 0.02`, of the best model."""
        return f"{title_of(self.card.score)} {with_margin(self.interval(self.best))}"

    def value(self, other: Contender) -> str:
        """Of another, with the digits that the best model's interval bears."""
        return rounded(self.interval(other).value, self.interval(self.best))

    def against(self, other: Contender) -> str:
        """`untrained 0.66`."""
        return f"{short_of(other.role, self.card.score)} {self.value(other)}"

    def pair(self, other: Contender) -> str:
        """`k-NN 0.74 ± 0.02 against 0.66`."""
        return f"{self.said()} against {self.value(other)}"


def gain(one: Score, other: Score, best_of: tuple[int, int] = (1, 1), level: float = LEVEL) -> Gain:
    """By how much one score is better than another.

    Args:
        one: that may be better.
        other: of the same images.
        best_of: evaluations on these images that each is the best of. The best of many looks
            better than it is, so the end that would call it better is one of 1 - (1 - level) / n
            (Bonferroni), by the normal distribution: the draws of a bootstrap are too few so far
            out.
        level: of the interval.

    Raises:
        DataError: they cannot be compared, see `difference`.
    """
    between, scale = difference(one, other, level=level), 1.0
    if is_lower_better(one.name):
        between = Interval(-between.value, -between.high, -between.low)
        scale = abs(other.value)
    single, *tails = (NormalDist().inv_cdf((1 - level) / 2 / count) for count in (1, *best_of))
    value, wider = between.value, [tail / single for tail in tails]
    low, high = value - (value - between.low) * wider[0], value + (between.high - value) * wider[1]
    chosen = replace(between, low=low, high=high) if max(best_of) > 1 else between
    return Gain(chosen, between, scale, len(one.ids))


def is_comparable(one: Score | None, other: Score | None) -> bool:
    """Whether two scores are the same one, of the same images."""
    if one is None or other is None:
        return False
    return (one.name, one.statistic, one.images) == (other.name, other.statistic, other.images)
