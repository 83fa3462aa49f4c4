"""Evaluates one backbone on shards: weighted k-NN where there are labels, health in any case.

Plain Python over parquet shards, so it runs in a job, in a Ray actor beside the training, or in a
test.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.crops import resize_centre_crop
from pipeline.data.decode import BadImage, decode_image
from pipeline.data.row_group import RowGroup, read_row_group
from pipeline.data.schema import ShardSet
from pipeline.errors import DataError
from pipeline.evaluate.features import embed
from pipeline.evaluate.health import effective_rank, feature_std, teacher_entropy
from pipeline.evaluate.knn import knn_classify, nearest, raw_pixels
from pipeline.evaluate.pictures import neighbours_grid, pca_grid
from pipeline.model.pair import Encoder

log = logging.getLogger("pipeline.evaluate")

HEALTH_IMAGES = 1024  # enough for a stable rank at usual widths, seconds to embed
PCA_IMAGES = 8  # pairs of image and map fill a 4 x 4 grid
SHOWN = 4  # queries in the picture of neighbours, each with its three nearest
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
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_size: int
    seed: int
    max_pixels: int
    half: bool = False  # embed in bfloat16
    channels: int = 3  # of an image, as `mean` and `std` have

    def compared(self, limit: int | None = None) -> str:
        """What a k-NN compares: `500 of 576 queries by 500 of 3,440 reference images`.

        Two values of one step are of different images where the limits differ.

        Args:
            limit: images of each set at most; None for all.
        """
        if not (self.queries and self.reference):
            return ""

        def counted(rows: int, what: str) -> str:
            return f"{f'{limit:,} of ' if limit and limit < rows else ''}{rows:,} {what}"

        queries = counted(self.queries.rows, "queries")
        return f"{queries} by {counted(self.reference.rows, 'reference images')}"


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, pictures (square uint8 grids) by name."""

    metrics: dict[str, float]
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


class Evaluator:
    """Keeps decoded images between evaluations of the same run, as far as they are few.

    Args:
        spec: sets and settings.
        threads: torch threads; beside a training worker, 1.
        device: where the backbone runs.
    """

    def __init__(self, spec: EvaluationSpec, threads: int = 1, device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        self.spec = spec
        self.device = torch.device(device)
        self._kept: dict[tuple[str, int | None], list[LabelledImages]] = {}

    def run(self, backbone: nn.Module, limit: int | None = None) -> Evaluation:
        """k-NN top-1, feature health and the PCA picture of a backbone.

        Args:
            backbone: in any mode; it is evaluated without gradients. One without patch tokens has
                no PCA picture.
            limit: at most so many images of each set, drawn with the seed; None for all.
        """
        spec = self.spec
        backbone = backbone.to(self.device).eval()
        metrics: dict[str, float] = {}
        pictures: dict[str, np.ndarray] = {}
        if spec.reference and spec.queries:
            reference, votes = self.features(backbone, spec.reference, limit)
            shown = spec.queries
            features, labels = self.features(backbone, shown, limit)
            classes = max(int(votes.max()), int(labels.max())) + 1
            found = knn_classify(
                reference, votes, features, labels, classes, spec.k, spec.temperature
            )
            metrics[f"eval/knn{spec.k}_top1"] = found[spec.k]
            if kept := self._kept.get((spec.reference.digest, limit)):
                first = next(self.parts(shown, limit)).images[:SHOWN]
                _, rows = nearest(reference, features[:SHOWN], SHOWN - 1)
                picked = [
                    [kept[r // spec.batch_size].images[r % spec.batch_size] for r in row]
                    for row in rows.tolist()
                ]
                correct = (votes[rows] == labels[:SHOWN, None]).numpy()
                pictures["neighbours"] = neighbours_grid(first, np.asarray(picked), correct)
        else:
            shown, limit = spec.sample, min(limit or HEALTH_IMAGES, HEALTH_IMAGES)
            features, _ = self.features(backbone, shown, limit)
        metrics["health/feature_std"] = float(feature_std(features))
        metrics["health/effective_rank"] = float(effective_rank(features))
        first = next(self.parts(shown, limit)).images[:PCA_IMAGES]
        if (picture := pca_grid(backbone, first, spec.mean, spec.std)) is not None:
            pictures["patch_pca"] = picture
        return Evaluation(metrics, pictures)

    def raw_pixels(self, limit: int | None = None) -> float | None:
        """k-NN top-1 of the pixels themselves, for comparison; None without labels."""
        spec = self.spec
        if not (spec.reference and spec.queries):
            return None
        sets = (self.parts(spec.reference, limit), self.parts(spec.queries, limit))
        return raw_pixels(*sets, k=spec.k, temperature=spec.temperature)

    def target_health(self, teacher: Encoder, temperature: float) -> dict[str, float]:
        """Entropy of the teacher's targets in nats, and how many prototypes they choose.

        On the health sample, centred by its own mean: the centre that training would arrive at.
        """
        features, _ = self.features(teacher.backbone, self.spec.sample, HEALTH_IMAGES)
        head = teacher.dino_head.to(self.device).eval()
        with torch.no_grad():
            logits = head(features.to(self.device)).float()
        targets = torch.softmax((logits - logits.mean(0)) / temperature, 1)
        return {
            "health/teacher_entropy": float(teacher_entropy(targets)),
            "health/prototypes_used": float(len(set(targets.argmax(1).tolist()))),
        }

    def features(
        self, backbone: nn.Module, shards: ShardSet, limit: int | None
    ) -> tuple[Tensor, Tensor]:
        """CLS features [N, D] and labels [N] of a set."""
        spec = self.spec
        labels: list[np.ndarray] = []

        def images() -> Iterator[np.ndarray]:
            for part in self.parts(shards, limit):
                labels.append(part.labels)
                yield part.images

        dtype = torch.bfloat16 if spec.half else torch.float32
        found = embed(backbone, images(), spec.mean, spec.std, self.device, dtype)
        return found, torch.from_numpy(np.concatenate(labels))

    def parts(self, shards: ShardSet, limit: int | None) -> Iterator[LabelledImages]:
        """Decoded images of a set in batches, from memory where the set is small."""
        key = (shards.digest, limit)
        if key in self._kept:
            yield from self._kept[key]
            return
        rows = min(limit or shards.rows, shards.rows)
        small = rows * self.spec.channels * self.spec.image_size**2 <= CACHE_BYTES
        kept = []
        for part in read_images(shards, self.spec, limit):
            if small:
                kept.append(part)
            yield part
        if small:
            self._kept[key] = kept


@dataclass(frozen=True)
class LabelledImages:
    """A batch: `images` uint8 [B, S, S, C], `labels` int64 [B], -1 where unknown."""

    images: np.ndarray
    labels: np.ndarray


def read_images(
    shards: ShardSet, spec: EvaluationSpec, limit: int | None
) -> Iterator[LabelledImages]:
    """Decodes a set, or `limit` of its rows drawn with the seed, in batches; bad rows are left out.

    Raises:
        DataError: where not one image could be decoded.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    good = bad = 0
    for table, row in _rows(shards, spec.seed, limit):
        try:
            image = decode_image(table.image(row), spec.channels, spec.max_pixels)
        except BadImage:
            bad += 1
            continue
        good += 1
        images.append(resize_centre_crop(image, spec.image_size))
        labels.append(int(table.labels[row]))
        if len(images) == spec.batch_size:
            yield LabelledImages(np.stack(images), np.asarray(labels, np.int64))
            images, labels = [], []
    if images:
        yield LabelledImages(np.stack(images), np.asarray(labels, np.int64))
    if bad:
        log.warning("%d of %d images of %s could not be decoded", bad, good + bad, shards.uri)
    if not good:
        raise DataError(f"no image of {shards.uri} could be decoded", "pack it to see the reasons")


def _rows(shards: ShardSet, seed: int, limit: int | None) -> Iterator[tuple[RowGroup, int]]:
    rows = np.arange(shards.rows)
    if limit is not None and limit < shards.rows:
        rows = np.sort(np.random.default_rng([seed, 1]).permutation(shards.rows)[:limit])
    first = 0
    for file_index, file in enumerate(shards.files):
        for group, count in enumerate(file.row_groups):
            wanted = rows[(rows >= first) & (rows < first + count)] - first
            first += count
            if len(wanted):
                table = read_row_group(shards, file_index, group)
                yield from ((table, row) for row in wanted.tolist())
