"""Numbers, sizes, times and names of metrics as a report says them."""

from __future__ import annotations

import re

from pipeline.card.words import detail_of, title_of

STAGES = {
    "pack": "packing",
    "curate": "curation",
    "adapt": "recipe, scores before",
    "pretrain": "training",
    "evaluate": "evaluation",
    "export": "weights",
    "finetune": "fine-tuning",
    "embed": "vectors",
    "search": "search page",
    "look": "pictures of patches",
}
GROUPS = {
    "eval": "Scores",
    "loss": "Losses",
    "health": "Health",
    "optim": "Optimiser",
    "perf": "Speed",
    "data": "Data",
    "guard": "Guard",
}
UNITS = (("_per_s", " per s"), ("_ms", " (ms)"), ("_gib", " (GiB)"), ("_s", " (s)"))
SMALL = {"lr": "learning rate", "kl": "KL", "mfu": "MFU", "grad": "gradient"}


def stage_name(name: str) -> str:
    """`training` of `pretrain`; `training, round 1` of `round-1/pretrain`."""
    above, _, stage = name.rpartition("/")
    said = STAGES.get(stage, stage.replace("-", " "))
    return f"{said}, {above.replace('-', ' ')}" if above else said


def metric_name(name: str) -> str:
    """`k-NN, 20 neighbours` of `eval/knn20_top1`, `gradient norm` of `optim/grad_norm`."""
    last = name.rpartition("/")[2]
    if title_of(last) != last.replace("_", " "):
        return ", ".join(filter(None, (title_of(last), detail_of(last))))
    unit = unit_of(last)
    last = next((last.removesuffix(end) for end, said in UNITS if unit and said == unit), last)
    words = re.sub(r"^(\w+)_fraction$", r"share of \1", last).split("_")
    return " ".join(SMALL.get(word, word) for word in words) + unit


def unit_of(metric: str) -> str:
    """What a metric is measured in, by the end of its name; "" where it has none."""
    return next((said for end, said in UNITS if metric.endswith(end)), "")


def images(number: int) -> str:
    """`1 image`, `12,345 images`."""
    return f"{number:,} image" + "s" * (number != 1)


def speed(number: float) -> str:
    """Images a second: `0.4`, `39`, `2,410`."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
