"""A small fine-tuning for tests: images of two colours, a ViT of two blocks, settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.finetune.classifier import Classifier, classifier_of
from pipeline.finetune.images import LabelledImages, Worker
from pipeline.finetune.rows import Rows, rows_of
from pipeline.finetune.settings import Settings
from pipeline.model.vit import BackboneSpec, VisionTransformer
from pipeline.shards.classes import Classes
from pipeline.shards.shard_set import ShardSet
from tests.data import encoded, noise, own_table, stored

SPEC = BackboneSpec(
    image_size=8, patch_size=4, width=16, depth=2, heads=2, registers=1, layer_scale=0.1
)
SETTINGS = Settings(
    model="small",
    digest="",
    from_scratch=False,
    tune="all",
    rank=2,
    steps=6,
    batch_size=4,
    lr=1e-2,
    layerwise_decay=0.5,
    weight_decay=0.05,
    warmup=0.34,
    drop_path=0.0,
    mixup=0.0,
    label_smoothing=0.0,
    image_size=8,
    crop_scale=(0.35, 1.0),
    flip=0.5,
    precision="float32",
    seed=3,
    images="",
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
NAMES = ("blue", "red")


def settings(**changes: Any) -> Settings:
    """The settings with some changed."""
    return replace(SETTINGS, **changes)


def backbone(seed: int = 0, **changes: Any) -> VisionTransformer:
    """A ViT that is always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return replace(SPEC, **changes).build().eval()


def classifier(**changes: Any) -> Classifier:
    """As training would begin with it."""
    return classifier_of(backbone(), 2, settings(**changes))


def pixels(number: int) -> np.ndarray[Any, Any]:
    """A picture [10 to 13, 12, 3] of class `number % 2`."""
    picture = noise(number, 10 + number % 4, 12)
    picture[..., 2 * (number % 2)] //= 4
    return picture


def shards(folder: Path, count: int = 12, group: int = 5, **columns: Any) -> ShardSet:
    """A packed set of two classes."""
    images = [encoded(pixels(number)) for number in range(count)]
    labels = columns.pop("label", [number % 2 for number in range(count)])
    names = columns.pop("names", NAMES)
    return stored(own_table(images, labels, names, **columns), folder / "a.parquet", group)


def rows(shards: ShardSet) -> Rows:
    """All of its rows."""
    return rows_of("data.shards", shards, Classes(NAMES))


def images(shards: ShardSet, worker: Worker | None = None, **changes: Any) -> LabelledImages:
    """All of its images, to train on."""
    return LabelledImages(shards, rows(shards), settings(**changes), worker or Worker(), 0)
