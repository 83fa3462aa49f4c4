"""Evaluates one backbone on shards: weighted k-NN where there are labels, health in any case.

Plain Python over parquet shards, so it runs in a job, in a Ray actor beside the training, or in a
test.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from pipeline.errors import DataError
from pipeline.evaluate.features import embed
from pipeline.evaluate.health import effective_rank, feature_std, teacher_entropy
from pipeline.evaluate.knn import LabelledFeatures, knn_classify, raw_pixels
from pipeline.evaluate.neighbours import SameImages, nearest
from pipeline.evaluate.pictures import neighbours_grid, pca_grid
from pipeline.images.decode import BadImage, decode_image
from pipeline.model.pair import Encoder
from pipeline.shards.overlap import shared_classes
from pipeline.shards.row_group import RowGroup, read_row_group
from pipeline.shards.shards import ShardSet
from pipeline.views.crops import resize_centre_crop

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

    def key(self, limit: int | None = None) -> str:
        """Changes with the images and settings of a k-NN: scores with two keys are unlike.

        Args:
            limit: as for `compared`.
        """
        sets = [shards for shards in (self.queries, self.reference) if shards]
        sampled = limit is not None and any(limit < shards.rows for shards in sets)
        content = [
            [[s.digest, s.label_column, s.class_names, s.columns.value_range] for s in sets],
            [self.image_size, self.k, self.temperature, self.mean, self.std, self.channels],
            [limit, self.seed] if sampled else [],
        ]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


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
        sets = [("queries", spec.queries), ("reference", spec.reference)]
        self.classes = shared_classes([(what, shards) for what, shards in sets if shards])
        # By the set itself: files of others may have one digest in two places.
        self._kept: dict[tuple[ShardSet, int | None], list[LabelledImages]] = {}

    def run(
        self,
        backbone: nn.Module,
        limit: int | None = None,
        stored: Mapping[ShardSet, LabelledFeatures] | None = None,
    ) -> Evaluation:
        """k-NN top-1, feature health and the PCA picture of a backbone.

        Args:
            backbone: in any mode; it is evaluated without gradients. One without patch tokens has
                no PCA picture.
            limit: at most so many images of each set, drawn with the seed; None for all.
            stored: features of this backbone that are there already, with labels as in their set.
        """
        spec = self.spec
        backbone = backbone.to(self.device).eval()
        metrics: dict[str, float] = {}
        pictures: dict[str, np.ndarray] = {}
        if spec.reference and spec.queries:
            shown = spec.queries
            reference, queries = (
                self._comparable(one, (stored or {})[one])
                if one in (stored or {})
                else self.features(backbone, one, limit)
                for one in (spec.reference, shown)
            )
            features = queries.features
            metrics[f"eval/knn{spec.k}_top1"] = self._top1(reference, queries)
            if (picture := self._neighbours(reference, queries, limit)) is not None:
                pictures["neighbours"] = picture
        else:
            shown, limit = spec.sample, min(limit or HEALTH_IMAGES, HEALTH_IMAGES)
            features = self.features(backbone, shown, limit).features
        metrics["health/feature_std"] = float(feature_std(features))
        metrics["health/effective_rank"] = float(effective_rank(features))
        first = next(self.parts(shown, limit)).images[:PCA_IMAGES]
        if (picture := pca_grid(backbone, first, spec.mean, spec.std)) is not None:
            pictures["patch_pca"] = picture
        return Evaluation(metrics, pictures)

    def top1(self, backbone: nn.Module, limit: int | None = None) -> float | None:
        """k-NN top-1 alone, of whatever gives `[b, D]` for `[b, C, S, S]`; None without labels."""
        spec = self.spec
        if not (spec.reference and spec.queries):
            return None
        sets = (self.features(backbone, shards, limit) for shards in (spec.reference, spec.queries))
        return self._top1(*sets)

    def _top1(self, reference: LabelledFeatures, queries: LabelledFeatures) -> float:
        classes = max(int(reference.labels.max()), int(queries.labels.max())) + 1
        k, temperature = self.spec.k, self.spec.temperature
        return knn_classify(reference, queries, classes, k, temperature)[k]

    def _comparable(self, shards: ShardSet, stored: LabelledFeatures) -> LabelledFeatures:
        """Features with labels that count in `classes`."""
        labels = self.classes.mapped(stored.labels.numpy(), shards.class_names, shards.uri)
        return replace(stored, labels=torch.from_numpy(labels))

    def _neighbours(
        self, reference: LabelledFeatures, queries: LabelledFeatures, limit: int | None
    ) -> np.ndarray | None:
        """The first labelled queries, each with its nearest labelled images of the reference; None
        where the images are too many to be kept.
        """
        spec = self.spec
        assert spec.reference and spec.queries
        kept = [self._kept.get((x, limit)) for x in (spec.queries, spec.reference)]
        if not (kept[0] and kept[1]):
            return None

        def images(parts: list[LabelledImages], rows: Iterable[int]) -> list[np.ndarray]:
            return [parts[r // spec.batch_size].images[r % spec.batch_size] for r in rows]

        assert reference.ids is not None and queries.ids is not None
        first = (queries.labels >= 0).nonzero()[:SHOWN, 0]
        voters = (reference.labels >= 0).nonzero()[:, 0]
        _, nearest_rows = nearest(
            reference.features[voters],
            queries.features[first],
            SHOWN - 1,
            same=SameImages.of(reference.ids[voters.numpy()], queries.ids[first.numpy()]),
        )
        rows = voters[nearest_rows]
        correct = (reference.labels[rows] == queries.labels[first, None]).numpy()
        shown = np.asarray([images(kept[1], row) for row in rows.tolist()])
        return neighbours_grid(np.asarray(images(kept[0], first.tolist())), shown, correct)

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
        features = self.features(teacher.backbone, self.spec.sample, HEALTH_IMAGES).features
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
    ) -> LabelledFeatures:
        """CLS features of a set, with labels and ids."""
        spec = self.spec
        labels: list[np.ndarray] = []
        ids: list[np.ndarray] = []

        def images() -> Iterator[np.ndarray]:
            for part in self.parts(shards, limit):
                labels.append(part.labels)
                ids.append(part.ids)
                yield part.images

        dtype = torch.bfloat16 if spec.half else torch.float32
        vectors = embed(backbone, images(), spec.mean, spec.std, self.device, dtype)
        return LabelledFeatures(
            vectors, torch.from_numpy(np.concatenate(labels)), np.concatenate(ids)
        )

    def parts(self, shards: ShardSet, limit: int | None) -> Iterator[LabelledImages]:
        """Decoded images of a set in batches, from memory where the set is small; labels count in
        `classes`.
        """
        key = (shards, limit)
        if key in self._kept:
            yield from self._kept[key]
            return
        compared = shards in (self.spec.reference, self.spec.queries)
        rows = min(limit or shards.rows, shards.rows)
        small = rows * self.spec.channels * self.spec.image_size**2 <= CACHE_BYTES
        kept = []
        for part in read_images(shards, self.spec, limit):
            if compared:
                labels = self.classes.mapped(part.labels, shards.class_names, shards.uri)
                part = replace(part, labels=labels)
            if small:
                kept.append(part)
            yield part
        if small:
            self._kept[key] = kept


@dataclass(frozen=True)
class LabelledImages:
    """A batch: `images` uint8 [B, S, S, C], `labels` int64 [B], -1 where unknown, `ids` uint8
    [B, 16].
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


def read_images(
    shards: ShardSet, spec: EvaluationSpec, limit: int | None
) -> Iterator[LabelledImages]:
    """Decodes a set, or `limit` of its rows drawn with the seed, in batches; bad rows are left out.

    Raises:
        DataError: where not one image could be decoded.
    """
    rows: list[tuple[np.ndarray, int, np.ndarray]] = []  # image, label, id
    good = bad = 0

    def batch() -> LabelledImages:
        images, labels, ids = zip(*rows, strict=True)
        return LabelledImages(np.stack(images), np.asarray(labels, np.int64), np.stack(ids))

    for table, row in _rows(shards, spec.seed, limit):
        try:
            image = decode_image(
                table.checked(row), spec.channels, spec.max_pixels, shards.columns.value_range
            )
        except BadImage:
            bad += 1
            continue
        good += 1
        small = resize_centre_crop(image, spec.image_size)
        rows.append((small, int(table.labels[row]), table.image_ids[row]))
        if len(rows) == spec.batch_size:
            yield batch()
            rows.clear()
    if rows:
        yield batch()
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
            inside = rows[(rows >= first) & (rows < first + count)] - first
            first += count
            if len(inside):
                table = read_row_group(shards, file_index, group)
                yield from ((table, row) for row in inside.tolist())
