"""Evaluates one backbone on shards: weighted k-NN where there are labels, health in any case.

Plain Python over parquet shards, so it runs in a job, in a Ray actor beside the training, or in a
test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.evaluate.deciding import (
    TrainingScores,
    deciding_score,
    training_scores,
    why_unusable,
)
from pipeline.evaluate.features import LabelledFeatures, embed
from pipeline.evaluate.guard.answers import Answers
from pipeline.evaluate.guard.measure import smoothness_of, structure_of
from pipeline.evaluate.health import effective_rank, feature_std, teacher_entropy
from pipeline.evaluate.images import LabelledImages, read_images
from pipeline.evaluate.neighbours.knn import knn_score
from pipeline.evaluate.neighbours.nearest import SameImages, nearest
from pipeline.evaluate.pictures import neighbours_grid, pca_grid
from pipeline.model.pair import Encoder
from pipeline.shards.overlap import shared_classes
from pipeline.shards.shards import ShardSet

HEALTH_IMAGES = 1024  # enough for a stable rank at usual widths, seconds to embed
PCA_IMAGES = 8  # pairs of image and map fill a 4 x 4 grid
SHOWN = 4  # queries in the picture of neighbours, each with its three nearest
CACHE_BYTES = 2**30  # of decoded images kept between evaluations


@dataclass(frozen=True)
class EvaluatedOn:
    """What scores are of: those with two keys are unlike.

    Attributes:
        key: see `EvaluationSpec.key`.
        asked: digest of the images that are classified; "": none are.
    """

    key: str = ""
    asked: str = ""


@dataclass(frozen=True)
class EvaluationSpec:
    """What to evaluate on. `reference` is None where there are no labels; `queries` is None there
    too, and where each image of the reference is classified by the others.
    """

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
    decide_by: str = ""  # score that chooses the best checkpoint; "": k-NN, without labels none
    guard: str | None = None  # score that is compared with the start; "": as decided; None: none is
    keep: ShardSet | None = None  # on which nothing is to be forgotten

    def compared(self, limit: int | None = None) -> str:
        """What a k-NN compares: `500 of 576 queries by 500 of 3,440 reference images`.

        Two values of one step are of different images where the limits differ.

        Args:
            limit: images of each set at most; None for all.
        """

        def counted(rows: int, what: str) -> str:
            return f"{f'{limit:,} of ' if limit and limit < rows else ''}{rows:,} {what}"

        if not self.reference:
            return ""
        if not self.queries:
            return f"each of {counted(self.reference.rows, 'images')} by the others"
        queries = counted(self.queries.rows, "queries")
        return f"{queries} by {counted(self.reference.rows, 'reference images')}"

    def key(self, limit: int | None = None) -> str:
        """Changes with the images and settings of a k-NN: scores with two keys are unlike.

        Args:
            limit: as for `compared`.
        """
        sets = [x for x in (self.queries, self.reference) if x] or [self.sample]
        sampled = limit is not None and any(limit < shards.rows for shards in sets)
        content = [
            [[s.digest, s.label_column, s.class_names, s.columns.value_range] for s in sets],
            [self.image_size, self.k, self.temperature, self.mean, self.std, self.channels],
            [limit, self.seed] if sampled else [],
        ]
        return _digest(content)

    def evaluated_on(self, limit: int | None = None) -> EvaluatedOn:
        """Which images and settings scores are of.

        Args:
            limit: as for `compared`.
        """
        asked = self.queries or self.reference
        return EvaluatedOn(self.key(limit), asked.digest if asked else "")

    def guard_key(self, limit: int | None = None) -> str:
        """Changes with all that the guard compares: answers with two keys are unlike.

        Args:
            limit: as for `compared`.
        """
        kept = [self.keep.digest, self.keep.class_names] if self.keep else []
        return _digest([self.key(limit), self.guard, self.decide_by, self.half, limit, kept])


def _digest(content: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, pictures (square uint8 grids) by name."""

    metrics: dict[str, float]
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    decided_by: str = ""  # the metric by which checkpoints are compared; "": none
    note: str = ""  # why labels, or the score that was asked for, were not used
    answers: Answers = field(default_factory=Answers)  # for the guard, where there is one


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

    def run(self, backbone: nn.Module, limit: int | None = None) -> Evaluation:
        """Scores, feature health and the PCA picture of a backbone.

        Args:
            backbone: in any mode; it is evaluated without gradients. One without patch tokens has
                no PCA picture.
            limit: at most so many images of each set, drawn with the seed; None for all.
        """
        spec = self.spec
        backbone = backbone.to(self.device).eval()
        pictures: dict[str, np.ndarray] = {}
        if not spec.reference:
            limit = min(limit or HEALTH_IMAGES, HEALTH_IMAGES)
        reference, queries = self._both(backbone, limit)
        scores = (
            training_scores(
                reference, queries, spec.k, spec.decide_by, spec.temperature, spec.guard or ""
            )
            if spec.reference
            else TrainingScores.unlabelled(queries, spec.decide_by)
        )
        labelled = len(scores.values) > 1
        if labelled and (picture := self._neighbours(reference, queries, limit)) is not None:
            pictures["neighbours"] = picture
        metrics = {f"eval/{name}": value for name, value in scores.values.items()}
        features = queries.features
        metrics["health/feature_std"] = float(feature_std(features))
        metrics["health/effective_rank"] = float(effective_rank(features))
        shown = spec.queries or spec.reference or spec.sample
        first = next(self.parts(shown, limit)).images[:PCA_IMAGES]
        if (picture := pca_grid(backbone, first, spec.mean, spec.std)) is not None:
            pictures["patch_pca"] = picture
        decided_by = scores.decided_by and f"eval/{scores.decided_by}"
        answers = Answers()
        if spec.guard is not None:
            answers = self._answers(backbone, scores, queries, limit)
        if answers.keep is not None:
            metrics[f"eval/keep_{answers.keep.name}"] = answers.keep.value
        return Evaluation(metrics, pictures, decided_by, scores.note, answers)

    def _answers(
        self,
        backbone: nn.Module,
        scores: TrainingScores,
        queries: LabelledFeatures,
        limit: int | None,
    ) -> Answers:
        """What the guard compares: a score where there are labels, else the structure."""
        spec, keep, structure = self.spec, None, None
        if spec.keep is not None:
            kept = self.features(backbone, spec.keep, limit)
            keep = knn_score(kept, kept, spec.k, spec.temperature)
        if scores.guarded is None:
            shown = spec.queries or spec.reference or spec.sample
            images = (part.images for part in self.parts(shown, limit))
            smoothness = smoothness_of(backbone, images, spec.mean, spec.std)
            structure = structure_of(queries, spec.k, smoothness)
        return Answers(scores.guarded, structure, keep)

    def top1(self, backbone: nn.Module, limit: int | None = None) -> float | None:
        """k-NN top-1 alone, of whatever gives `[b, D]` for `[b, C, S, S]`; None without labels."""
        if not self.spec.reference:
            return None
        reference, queries = self._both(backbone, limit)
        if queries is reference and why_unusable(queries.labels):
            return None
        name = f"knn{self.spec.k}_top1"
        return deciding_score(name, reference, queries, self.spec.temperature)

    def _both(
        self, backbone: nn.Module, limit: int | None
    ) -> tuple[LabelledFeatures, LabelledFeatures]:
        """Features of the reference and of the queries, which may be the same."""
        sets = [x for x in (self.spec.reference, self.spec.queries) if x] or [self.spec.sample]
        features = [self.features(backbone, x, limit) for x in sets]
        return features[0], features[-1]

    def _neighbours(
        self, reference: LabelledFeatures, queries: LabelledFeatures, limit: int | None
    ) -> np.ndarray | None:
        """The first labelled queries, each with its nearest labelled images of the reference; None
        where the images are too many to be kept.
        """
        spec = self.spec
        reference_set = spec.reference or spec.sample
        kept = [self._kept.get((x, limit)) for x in (spec.queries or reference_set, reference_set)]
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

    def target_health(self, teacher: Encoder, temperature: float) -> dict[str, float]:
        """Entropy of the teacher's targets in nats, and how many prototypes they choose.

        On the health sample, centred by its own mean: the centre that training would arrive at.
        None of them without heads.
        """
        if teacher.dino_head is None:
            return {}
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
