"""What a resumed run takes from its checkpoint, and which fields of the recipe may differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.config.config import Config
from pipeline.config.load import field_paths
from pipeline.errors import TrainError
from pipeline.plan.plan import Plan

# A resumed run may change these and nothing else: they do not touch what is learnt.
MAY_CHANGE = (
    "run.folder",
    "data.source",
    "data.shards",
    "data.max_bad_fraction",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_last",
    "train.max_restarts",
    "train.workers",
    "train.accumulation",
    "train.compile",
    "train.strategy",
    "train.activation_checkpointing",
    "train.loss_kernels",
    "train.profile_steps",
    # which images they chose is held by the digest of the shards
    "adapt.",
    "curate.",
    "quality.",
    "dedup.",
    "leaks.",
    "retrieve.",
    "balance.",
    "mix.",
    "evaluate.",
    "guard.",
    "export.",
    "finetune.",
    "embed.",
    "search.",
    "serve.",
    "start.",
    "look.",
    "track.",
    "resources.",
)


def changes(earlier: Config, config: Config) -> tuple[list[str], list[str]]:
    """Fields that differ from the config of a checkpoint: (may change, must not change)."""
    allowed: list[str] = []
    refused: list[str] = []
    for path, _ in field_paths():
        old, new = value_at(earlier, path), value_at(config, path)
        if old != new:
            may = any(path == p or (p.endswith(".") and path.startswith(p)) for p in MAY_CHANGE)
            (allowed if may else refused).append(f"{path}: {old} -> {new}")
    return allowed, refused


def value_at(config: Config, path: str) -> object:
    """The value of a dotted field."""
    node: object = config
    for name in path.split("."):
        node = getattr(node, name)
    return node


def plan_of(meta: Mapping[str, Any], place: object) -> Plan:
    """The plan that a checkpoint's `meta.json` holds.

    Raises:
        TrainError: it holds none, or one that was edited.
    """
    try:
        return Plan.model_validate(meta.get("plan"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("plan", *first["loc"]))
        raise TrainError(
            f"meta.json of {place} holds no plan of this version: {where}: {first['msg']}",
            "put it back from a copy, or remove that checkpoint and use another one",
        ) from error
