"""Evaluates one backbone on shards: weighted k-NN where there are labels, health in any case.

Plain Python over parquet shards, so it runs in a job, in a Ray actor beside the training, or in a
test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.data.crops import resize_centre_crop
from pipeline.data.decode import BadImage, decode_rgb
from pipeline.data.schema import ShardSet, read_row_group
from pipeline.evaluate.features import embed
from pipeline.evaluate.health import effective_rank, feature_std
from pipeline.evaluate.knn import knn_classify, raw_pixels
from pipeline.evaluate.pictures import pca_grid
from pipeline.model.vit import VisionTransformer

HEALTH_IMAGES = 1024  # enough for a stable rank at usual widths, seconds to embed
PCA_IMAGES = 8  # pairs of image and map fill a 4 x 4 grid
CACHE_BYTES = 2**30  # of decoded images kept between evaluations


@dataclass(frozen=True)
class EvaluationSpec:
    """What to evaluate on. `reference` and `queries` are None where there are no labels."""

    sample: ShardSet
    reference: ShardSet | None
    queries: ShardSet | None
    image_size: int
    k: int
    temperature: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    batch_size: int
    seed: int
    max_pixels: int
    half: bool = False  # embed in bfloat16


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, pictures (square uint8 grids) by name."""

    metrics: dict[str, float]
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


class Evaluator:
    """Keeps decoded images between evaluations of the same run.

    Args:
        spec: sets and settings.
        threads: torch threads; beside a training worker, 1.
    """

    def __init__(self, spec: EvaluationSpec, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self.spec = spec
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._images: dict[tuple[str, int | None], LabelledImages] = {}

    def run(self, backbone: VisionTransformer, limit: int | None = None) -> Evaluation:
        """k-NN top-1, feature health and the PCA picture of a backbone.

        Args:
            backbone: in any mode; it is evaluated without gradients.
            limit: at most so many images of each set, drawn with the seed; None for all.
        """
        spec = self.spec
        backbone = backbone.to(self.device).eval()
        metrics: dict[str, float] = {}
        if spec.reference and spec.queries:
            reference = self._features(backbone, self.images(spec.reference, limit))
            asked = self.images(spec.queries, limit)
            features = self._features(backbone, asked)
            labels = torch.from_numpy(self.images(spec.reference, limit).labels)
            classes = max(int(labels.max()), int(asked.labels.max())) + 1
            accuracies = knn_classify(
                reference,
                labels,
                features,
                torch.from_numpy(asked.labels),
                classes,
                k=spec.k,
                temperature=spec.temperature,
            )
            metrics[f"eval/knn{spec.k}_top1"] = accuracies[spec.k]
        else:
            asked = self.images(spec.sample, min(limit or HEALTH_IMAGES, HEALTH_IMAGES))
            features = self._features(backbone, asked)
        metrics["health/feature_std"] = float(feature_std(features))
        metrics["health/effective_rank"] = float(effective_rank(features))
        return Evaluation(metrics, {"patch_pca": self._pca(backbone, asked)})

    def raw_pixels(self, limit: int | None = None) -> float | None:
        """k-NN top-1 of the pixels themselves, for comparison; None without labels."""
        spec = self.spec
        if not (spec.reference and spec.queries):
            return None
        reference, queries = (self.images(s, limit) for s in (spec.reference, spec.queries))
        return raw_pixels(reference, queries, k=spec.k, temperature=spec.temperature)

    def images(self, shards: ShardSet, limit: int | None) -> LabelledImages:
        """Decoded images of a set, from memory where they were read before."""
        key = (shards.digest, limit)
        if key not in self._images:
            found = read_images(shards, self.spec, limit)
            if found.images.nbytes > CACHE_BYTES:
                return found
            self._images[key] = found
        return self._images[key]

    def _features(self, backbone: VisionTransformer, found: LabelledImages) -> Tensor:
        spec = self.spec
        dtype = torch.bfloat16 if spec.half else torch.float32
        parts = found.batches(spec.batch_size)
        return embed(backbone, parts, spec.mean, spec.std, self.device, dtype)

    def _pca(self, backbone: VisionTransformer, found: LabelledImages) -> np.ndarray:
        return pca_grid(backbone, found.images[:PCA_IMAGES], self.spec.mean, self.spec.std)


@dataclass(frozen=True)
class LabelledImages:
    """`images` uint8 [N, S, S, 3], `labels` int64 [N] (-1 unknown), and how many were bad."""

    images: np.ndarray
    labels: np.ndarray
    bad: int

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The images in parts of `size`."""
        for start in range(0, len(self.images), size):
            yield self.images[start : start + size]


def read_images(shards: ShardSet, spec: EvaluationSpec, limit: int | None) -> LabelledImages:
    """Reads and decodes a set, or `limit` of its rows drawn with the seed; bad ones are counted."""
    rows = np.arange(shards.rows)
    if limit is not None and limit < shards.rows:
        rows = np.sort(np.random.default_rng([spec.seed, 1]).permutation(shards.rows)[:limit])
    images, labels, bad, first = [], [], 0, 0
    for file_index, file in enumerate(shards.files):
        for group, count in enumerate(file.row_groups):
            wanted = rows[(rows >= first) & (rows < first + count)] - first
            first += count
            if not len(wanted):
                continue
            table = read_row_group(shards, file_index, group)
            for row in wanted.tolist():
                try:
                    image = decode_rgb(table.image(row), spec.max_pixels)
                except BadImage:
                    bad += 1
                    continue
                images.append(resize_centre_crop(image, spec.image_size))
                labels.append(int(table.labels[row]))
    size = spec.image_size
    stacked = np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)
    return LabelledImages(stacked, np.asarray(labels, np.int64), bad)
