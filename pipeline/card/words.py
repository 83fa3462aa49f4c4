"""Scores and baselines in words: titles, which way is better, and numbers as far as they bear."""

from __future__ import annotations

import math
import re

from pipeline.card.card import Role
from pipeline.evaluate.score import Interval

LOWER_IS_BETTER = ("_rmse", "_rel")  # ends of names; any other score is better where it is higher
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
    r"copies_map": "copy detection, mAP",
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
    r"(?:retrieval|copies)_recall(\d+)": "in the first {}",
    r"depth_(linear|head)_\w+": "{}",
}


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
            return words.format(match[1])
    return ""


def is_lower_better(score: str) -> bool:
    """Whether a score is an error."""
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
