"""The verdict: one or two sentences that a person can act on, by the first rule that fits.

Each rule is a function of a `Case` that gives its words, or nothing where it does not fit.
Differences are those of the same images with 95 % intervals (`evaluate.score.difference`), wider
where a contender is the best of several evaluations (`card.case.gain`). Two things are called
different where the interval of their difference is on one side of 0, and alike where it holds 0 and
is at most 0.05 to each side. Anything else is no verdict, and says how many images would do.
docs/evaluate.md has the rules as a table.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.card.card import Card, Verdict
from pipeline.card.case import Case, Facts, Gain, ModelFacts
from pipeline.card.started import (
    init_not_scored,
    kept_init,
    no_better_than_init,
    worse_than_init,
)
from pipeline.card.words import UNLABELLED, about, short_of, title_of, with_margin
from pipeline.evaluate.score import LEVEL

__all__ = ["RULES", "Facts", "ModelFacts", "verdict_of"]

COLLAPSES = ("rank_me", "feature_std", "effective_rank")  # what is low after a collapse
MIN_IMAGES = 30  # fewer do not show their own spread: ten of ten right would be 1.00 ± 0.00
MANY_SHARED = 0.1  # of the queries in the reference: their near copies are there, too
FEW_TO_TRAIN = 10_000  # images; a choice of ours: CIFAR-10's 50,000 are enough, 577 photos are not
MANY_PASSES = (
    20  # over so few images; a choice of ours: configs/small.yaml goes over them 200 times
)
WEIGHTS = "start from released weights (jobs/adapt.py, docs/adapt.md)"


def verdict_of(card: Card, facts: Facts | None = None) -> Verdict:
    """By the first rule that fits.

    Args:
        card: with the scores of all contenders; its own verdict is not looked at.
        facts: what else must be known.

    Returns:
        the rule's name and its sentences. The name is "" where no verdict is allowed.
    """
    case = Case(card, facts or Facts())
    for name, rule in WHOLE:
        if text := rule(case):
            return Verdict(name, text)
    name, text = _of_best(case)
    if len(case.models) == 1:
        return Verdict(name, text)
    rank, ranking = _ranking(case)
    if name in GOOD:
        return Verdict(rank, ranking)
    return Verdict(name or rank, f"{ranking} {text}")  # what is wrong with the best one weighs more


# Rules of the card as a whole. A rule named "" gives no verdict.


def _unscored(case: Case) -> str:
    """No model has the score that decides, though there are labels, or it is known why."""
    if case.models or case.card.score in UNLABELLED:
        return ""
    if not (case.is_labelled or case.facts.missing):
        return ""
    why = f": {case.facts.missing.rstrip('.')}" if case.facts.missing else ""
    return f"No verdict: no model has the score {case.card.score}{why}."


def _collapsed_without_labels(case: Case) -> str:
    """Without labels, an alarm or the spread and the rank of the vectors."""
    if case.models:
        return ""
    for one in (one for one in case.card.contenders if one.role == "model"):
        if alarm := case.alarm(one):
            return f"Collapsed: {alarm}"
    return ""


def _no_labels(case: Case) -> str:
    """Nothing but label-free numbers."""
    if case.models:
        return ""
    models = [one for one in case.card.contenders if one.role == "model"]
    named = [
        f"{title_of(name)} {one.results[name].interval.value:.3g}"
        for one in models[:1]
        for name in COLLAPSES
        if name in one.results
    ]
    numbers = f" ({', '.join(named)} show no collapse)" if named else ""
    if case.is_labelled:
        what = title_of(case.card.score)
        return f"No verdict on quality by {what}{numbers}: choose a score that uses the labels."
    return (
        f"No verdict on quality without labels{numbers}: name images with labels, such as "
        "data=photos/ with a folder for each class."
    )


def _one_class(case: Case) -> str:
    """All labels are the same."""
    classes = sum(1 for images in case.card.confusion.images if images)
    majority = case.baseline("majority")
    sure = majority is not None and case.interval(majority).value == 1
    if classes == 1 or sure:
        return "No verdict: all labelled images are of one class; give at least two classes."
    return ""


def _overlap(case: Case) -> str:
    """Many queries are in the reference."""
    queries = case.card.queries
    if queries is None or case.facts.shared <= MANY_SHARED * queries.labelled:
        return ""
    return (
        f"No verdict: {case.facts.shared:,} of {queries.labelled:,} queries are also in the "
        "reference, so the sets do not show what new images get; take other queries, or leave "
        "queries out."
    )


def _tiny(case: Case) -> str:
    """Fewer images than an interval can be made of."""
    if case.images >= MIN_IMAGES:
        return ""
    needed = max([MIN_IMAGES, *(gain.needed for _, gain in case.untelling())])
    return (
        f"No verdict: {case.images} labelled {'image is' if case.images == 1 else 'images are'} "
        "too few; about "
        f"{about(max(needed, 100))} would do."
    )


def _labels_at_chance(case: Case) -> str:
    """Models, colours and pixels are all no better than the most frequent class."""
    majority = case.baseline("majority")
    others = [one for role in ("colours", "raw_pixels") if (one := case.baseline(role))]
    if majority is None or not others:
        return ""
    gains = [case.gain(majority, one) for one in [*case.models, *others]]
    if any(one.is_better or one.is_unclear for one in gains):
        return ""
    values = ", ".join(case.against(one) for one in [*others, majority])
    return (
        f"The labels do not go with the images: {case.said()}, {values}. Look at some images with "
        "their labels; if they are right, nothing here sees what they are of."
    )


# Rules of the best model.


def _collapsed(case: Case) -> str:
    """An alarm, and no gain over the start that would belie it."""
    alarm = case.alarm(case.best)
    start = case.init or case.start
    if not alarm or (start and case.gain(start).is_better):
        return ""
    return f"Collapsed ({case.said()}): {alarm}"


def _worse_than_step0(case: Case) -> str:
    """Worse than the same network before training."""
    if case.start is None or not case.gain(case.start).is_worse:
        return ""
    return f"Worse than untrained ({case.pair(case.start)}): {_advice(case)}."


def _learnt_nothing(case: Case) -> str:
    """As good as the same network before training."""
    if case.start is None or not case.gain(case.start).is_none:
        return ""
    return f"Learnt nothing that shows ({case.pair(case.start)}): {_advice(case)}."


def _no_better_than(role: str) -> Callable[[Case], str]:
    def rule(case: Case) -> str:
        """The best of what needs no network is as good, or better."""
        simple = case.simple
        if simple is None or simple.role != role:
            return ""
        gain = case.gain(simple)
        if not (gain.is_worse or gain.is_none):
            return ""
        than = "Worse than" if gain.is_worse else "No better than"
        pair = f"{with_margin(case.interval(case.best))} against {case.value(simple)}"
        return f"{than} {short_of(simple.role, case.card.score)} ({pair}): {_advice(case)}."

    return rule


def _cannot_tell(case: Case) -> str:
    """A gain worth having could hide in an interval."""
    untelling = case.untelling()
    if not untelling:
        return ""
    other, gain = max(untelling, key=lambda pair: pair[1].needed)
    name = short_of(other.role, case.card.score)
    return (
        f"No verdict: {case.said()} on {case.images:,} images cannot be told from {name} "
        f"({case.value(other)}, difference {_difference(gain)}); about {about(gain.needed)} "
        "labelled images would do."
    )


def _better_than_init(case: Case) -> str:
    """Better than the weights that the run started from, and than what needs no network."""
    if case.init is None:
        return ""
    gain = case.gain(case.init)
    return (
        f"{'A little better' if gain.is_little else 'Better'} than what it started from: "
        f"{case.said()}, before {case.value(case.init)} ({_difference(gain)}).{_warning(case)}"
    )


def _learnt_little(case: Case) -> str:
    """Surely better than the same network before training, and surely not by much."""
    if case.start is None or not case.gain(case.start).is_little:
        return ""
    difference = _difference(case.gain(case.start))
    return f"Learnt a little ({case.pair(case.start)}, {difference}): {_advice(case)}."


def _learnt(case: Case) -> str:
    """Better than the same network before training, and than what needs no network."""
    if case.start is None:
        return ""
    simple = ""
    if case.simple:
        hardly = "hardly better than " if case.gain(case.simple).is_little else ""
        simple = f", {hardly}{case.against(case.simple)}"
    return f"Learnt: {case.said()}, {case.against(case.start)}{simple}.{_warning(case)}"


def _above_simple(case: Case) -> str:
    """Better than what needs no network, and no untrained network to compare with."""
    if case.simple is None or case.simple.role == "majority":
        return ""
    return (
        f"Better than {case.against(case.simple)}: {case.said()}; there is no untrained network "
        f"to compare with.{_warning(case)}"
    )


def _alone(case: Case) -> str:
    """Nothing to compare with but the most frequent class, if that."""
    simple = f", {case.against(case.simple)}" if case.simple else ""
    why = "of vectors alone" if case.facts.vectors_only else "without baselines"
    return (
        f"No verdict: {case.said()}{simple}, and a card {why} has nothing to compare with; "
        "name the model and the images: model=… data=photos/."
    )


WHOLE: list[tuple[str, Callable[[Case], str]]] = [
    ("", _unscored),
    ("collapsed", _collapsed_without_labels),
    ("", _no_labels),
    ("", _one_class),
    ("", _overlap),
    ("", _tiny),
    ("labels_at_chance", _labels_at_chance),
]
BEST: list[tuple[str, Callable[[Case], str]]] = [
    ("collapsed", _collapsed),
    ("kept_init", kept_init),
    ("worse_than_init", worse_than_init),
    ("worse_than_step0", _worse_than_step0),
    ("no_better_than_init", no_better_than_init),
    ("learnt_nothing", _learnt_nothing),
    ("no_better_than_colours", _no_better_than("colours")),
    ("no_better_than_raw_pixels", _no_better_than("raw_pixels")),
    ("no_better_than_majority", _no_better_than("majority")),
    ("", _cannot_tell),
    ("", init_not_scored),
    ("better_than_init", _better_than_init),
    ("learnt_little", _learnt_little),
    ("learnt", _learnt),
    ("above_simple", _above_simple),
    ("", _alone),
]
RULES = [*WHOLE, *BEST]
GOOD = ("better_than_init", "learnt", "above_simple")


def _of_best(case: Case) -> tuple[str, str]:
    return next((name, text) for name, rule in BEST if (text := rule(case)))


def _ranking(case: Case) -> tuple[str, str]:
    """The best of several models, or that they cannot be told apart.

    With m models there are m (m - 1) / 2 pairs, and the best is picked afterwards, so each interval
    is one of 1 - 0.05 / pairs (Bonferroni).
    """
    best, *others = case.models
    same = [one for one in others if case.score(one).images == case.score(best).images]
    level = 1 - (1 - LEVEL) / (len(case.models) * (len(case.models) - 1) / 2)
    gains = [(one, case.gain(one, level=level)) for one in same]
    alike = [one for one, against in gains if not against.is_better]
    worse = [one for one, against in gains if against.is_better]
    value = case.said()
    listed = ", ".join(f"{one.name} {case.value(one)}" for one in worse)
    if alike:
        names = ", ".join([best.name, *(one.name for one in alike[:-1])]) + f" and {alike[-1].name}"
        values = " and ".join([value, *(case.value(one) for one in alike)])
        behind = f"; behind them {listed}" if worse else ""
        return "equal_models", (
            f"{names} cannot be told apart on these {case.images:,} images ({values}){behind}."
        )
    others_said = listed or "no other model was scored on the same images"
    before = f"; {case.against(case.start)}" if case.start else ""
    return "best_model", f"Best: {best.name}, {value}; {others_said}{before}."


def _warning(case: Case) -> str:
    alarm = case.alarm(case.best)
    return f" But {alarm}" if alarm else ""


def _advice(case: Case) -> str:
    about_it = case.about_best
    if case.init and (gain := case.gain(case.init)).is_better:
        before = f"{case.value(case.init)} ({_difference(gain)})"
        return (
            f"better than what it started from, {before}; train longer, or start from other weights"
        )
    if case.init or case.best.start:
        return "keep the weights that it started from, or train again with a lower optim.lr"
    if 0 < about_it.training_images < FEW_TO_TRAIN and 0 < about_it.passes < MANY_PASSES:
        return (
            f"{about_it.passes:.2g} passes over {about_it.training_images:,} images are few; train "
            "longer (a new run.name with more optim.passes or optim.steps)"
        )
    if 0 < about_it.training_images < FEW_TO_TRAIN:
        return f"{about_it.training_images:,} images are too few to start from nothing; {WEIGHTS}"
    if about_it.training_images:
        return f"train longer (a new run.name with more optim.passes or optim.steps), or {WEIGHTS}"
    return "try other weights, or train from these (jobs/adapt.py, docs/adapt.md)"


def _difference(gain: Gain) -> str:
    return with_margin(gain.shown, sign=True)
