"""Scores and baselines in words: titles, which way is better, and numbers as far as they bear."""

from __future__ import annotations

import math
import re

from pipeline.card.card import Role
from pipeline.evaluate.score import Interval

# Ends of names; any other score is better where it is higher.
LOWER_IS_BETTER = ("_rmse", "_rel", "alignment", "uniformity")
UNLABELLED = (
    "rank_me", "feature_std", "effective_rank", "uniformity", "alignment", "patch_smoothness",
)  # fmt: skip
SHORT: dict[Role, str] = {
    "model": "the model",
    "step0": "untrained",
    "init": "what it started from",
    "untrained": "untrained",
    "raw_pixels": "raw pixels",
    "colours": "colours",
    "majority": "the most frequent class",
}
_TITLES = {
    r"knn(\d+)_top1": "k-NN",
    r"logistic_top1": "logistic regression",
    r"linear_top1": "linear layer",
    r"few_shot(\d+)_top1": "few-shot",
    r"retrieval_map": "retrieval, mAP",
    r"retrieval_recall(\d+)": "retrieval, recall",
    r"copies_map": "copy detection, one threshold (micro AP)",
    r"copies_recall(\d+)": "copy detection, recall",
    r"segmentation_linear_miou": "segmentation, linear, mIoU",
    r"segmentation_nearest_miou": "segmentation, nearest patches, mIoU",
    r"depth_(linear|head)_rmse": "depth, RMSE",
    r"depth_(linear|head)_rel": "depth, relative error",
    r"depth_(linear|head)_delta1": "depth, share within 1.25",
    r"finetune_top1": "fine-tuned",
    r"rank_me": "RankMe",
    r"feature_std": "spread",
    r"effective_rank": "effective rank",
    r"uniformity": "uniformity",
    r"alignment": "alignment",
    r"patch_smoothness": "patch smoothness",
}
_DETAILS = {
    r"knn(\d+)_top1": "{} neighbours",
    r"(?:retrieval|copies)_recall(\d+)": "at {}",
    r"depth_(linear|head)_\w+": "{}",
}


def short_of(role: Role, score: str) -> str:
    """A contender in a sentence about a score: of depths the constant answer is their mean."""
    return "the mean depth" if role == "majority" and score.startswith("depth_") else SHORT[role]


def chosen(name: str, evaluations: int) -> str:
    """What a card says of a model that is the best of several evaluations."""
    return (
        f"{name} was chosen as the best of {evaluations:,} evaluations on these images or a sample "
        "of them, so the verdict asks for more of it"
    )


def title_of(score: str) -> str:
    """A score's title without its numbers: `k-NN`; an unknown name is its own title."""
    matches = (title for name, title in _TITLES.items() if re.fullmatch(name, score))
    return next(matches, score.replace("_", " "))


def detail_of(score: str) -> str:
    """What of a score its title leaves out: `20 neighbours`; else ""."""
    if few := re.fullmatch(r"few_shot(\d+)_top1", score):
        return f"{few[1]} image{'' if few[1] == '1' else 's'} of each class"
    for name, words in _DETAILS.items():
        if match := re.fullmatch(name, score):
            return words.format(*match.groups())
    return ""


def is_lower_better(score: str) -> bool:
    """Whether less of a score is better: it is an error, or a distance."""
    return score.endswith(LOWER_IS_BETTER)


def decimals(margin: float) -> int:
    """Digits behind the point that an interval of this margin bears: 2 to 4, none from 1 on."""
    if not math.isfinite(margin) or margin <= 0:
        return 2
    return min(4, max(2 if margin < 1 else 0, -math.floor(math.log10(margin))))


def with_margin(interval: Interval, sign: bool = False) -> str:
    """`0.74 ± 0.02`; without an interval the value alone."""
    digits = decimals(interval.margin)
    value = f"{interval.value:{'+' if sign else ''},.{digits}f}"
    if interval.high == interval.low:
        return value
    return f"{value} ± {interval.margin:.{digits}f}"


def rounded(value: float, beside: Interval) -> str:
    """A value with the digits that the interval beside it bears."""
    return f"{value:,.{decimals(beside.margin)}f}"


def about(count: float) -> str:
    """A number of images with two digits that count: `1,300`."""
    if count < 100:
        return f"{math.ceil(count):,}"
    unit = 10 ** (math.floor(math.log10(count)) - 1)
    return f"{math.ceil(count / unit) * unit:,}"


# What a score says, and what it cannot say; by title.
SAYS: dict[str, tuple[str, str]] = {
    "k-NN": (
        "whether images of a class lie together, with nothing trained",
        "what a trained layer would still get out of the vectors",
    ),
    "logistic regression": (
        "what one layer gets out of the vectors, found by L-BFGS",
        "what fine-tuning of all weights would reach",
    ),
    "linear layer": (
        "the published protocol: the best head of a grid of rates and blocks",
        "how good one fixed setting is: the best of the grid is taken",
    ),
    "few-shot": (
        "how far a few labelled images go",
        "much about single draws: the value is a mean over several",
    ),
    "retrieval, mAP": ("whether all images of the class come first", "which ones a person wants"),
    "retrieval, recall": (
        "whether one image of the class is among the first",
        "whether the others come too",
    ),
    "copy detection, one threshold (micro AP)": (
        "whether one threshold tells changed copies of an image from other images",
        "anything about classes; compare at equal numbers of images",
    ),
    "copy detection, recall": (
        "whether a changed copy of an image is nearest to it",
        "anything about classes; compare at equal numbers of images",
    ),
    "segmentation, linear, mIoU": (
        "what one layer on the patches knows of classes of pixels",
        "how sharp outlines would be with a larger head",
    ),
    "segmentation, nearest patches, mIoU": (
        "whether patches of a class lie together, with nothing trained",
        "what a trained layer would still get out of the patches",
    ),
    "depth, RMSE": ("the error in the unit of the depths; smaller is better", "where it is made"),
    "depth, relative error": (
        "the error as a share of the depth; smaller is better",
        "errors of far things, which are large in metres",
    ),
    "depth, share within 1.25": ("pixels that are at most 25 % off", "how far off the others are"),
    "fine-tuned": ("what training all weights on the labels reaches", "how good the vectors were"),
    "RankMe": (
        "how many directions the vectors use; few goes with poor accuracy",
        "that many are good: noise uses all; compare at equal numbers of images",
    ),
    "effective rank": (
        "as RankMe, of vectors with their mean taken off",
        "that many are good; compare at equal numbers of images",
    ),
    "spread": (
        "0 where all vectors are equal, 1 where they point everywhere",
        "whether they point apart for a reason",
    ),
    "uniformity": (
        "how evenly the vectors fill the sphere: 0 all equal, about -4 even",
        "that what lies apart shows different things",
    ),
    "alignment": (
        "how far changed copies of an image lie from it: 0 the same, 2 at right angles",
        "that other images are apart: equal vectors have 0 too",
    ),
    "patch smoothness": (
        "by how much patches side by side are more alike than any two of the image",
        "that borders are where things end: a blur is smooth too",
    ),
}
