"""Heads and voting patches of the reference images, and what each scored image adds.

Shapes: n images, h x w patches, D width, K classes, T patches that vote.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.card.card import Result
from pipeline.card.dense.encoder import Encoder
from pipeline.card.dense.sets import DEPTH, MASKS, Sample
from pipeline.card.dense.split import DenseSettings, Split
from pipeline.evaluate.score import Score
from pipeline.use.segment import VOID

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.evaluate.dense.depth import Seen

NEIGHBOURS, TEMPERATURE = 30, 0.02  # Balazevic et al. 2023, "Hummingbird"

Counts = npt.NDArray[np.int64]  # [K, K], rows the truth
Errors = tuple[float, float, float, float]  # sums, of `depth_errors`
Overlaps = npt.NDArray[np.float64]  # [3 * K], of `overlaps`
Results = dict[str, Result]
Segment = Callable[["Tensor"], "Tensor"]  # patches [B, h, w, D] -> scores [B, h, w, K]
Depths = Callable[["Seen"], "Tensor"]  # -> depth [B, H, W]
SEGMENTATIONS, DEPTHS = ("linear", "nearest"), ("linear", "head")
ERRORS = {"rmse": "root_mean", "rel": "mean", "delta1": "mean"}


def scored(encoder: Encoder, split: Split, settings: DenseSettings) -> Results:
    """All scores that the targets of the sets allow.

    Args:
        encoder: what makes patches.
        split: which images are fitted to and scored.
        settings: the rest.
    """
    from pipeline.evaluate.dense.depth import Seen

    known = _known(encoder, split, settings)
    device = "cuda" if settings.gpu else "cpu"
    tally = _Tally(len(split.class_ids))
    segmentations: dict[str, Segment] = {}
    depths: dict[str, Depths] = {}
    if MASKS in split.reference.targets:
        segmentations = _segmentations(known, tally.classes, settings, device)
    if DEPTH in split.reference.targets:
        depths = _depths(known, settings, device)
    batches = encoder.batches(split.queries, split.asked, split.class_ids, settings.batch_size)
    for samples, tokens, cls in batches:
        seen = Seen(tokens.to(device), cls.to(device))
        for name, segment in segmentations.items():
            tally.masks(name, segment(seen.tokens), samples)
        for name, depth in depths.items():
            tally.depth(name, depth(seen), samples)
    details = {"grid": encoder.grid, "size": encoder.size, **split.details}
    return tally.results(split, details)


def constant_scores(split: Split) -> Results:
    """Of the most frequent class of the reference, and of its mean depth, by known pixels."""
    import torch

    classes = len(split.class_ids)
    pixels, total, known = np.zeros(256, np.int64), 0.0, 0
    for sample in split.reference.samples(split.rows, split.class_ids):
        if sample.mask is not None:
            pixels += np.bincount(sample.mask.ravel(), minlength=256)
        if sample.depth is not None:
            total += float(sample.depth.sum(dtype=np.float64))
            known += int(np.count_nonzero(sample.depth))
    tally = _Tally(classes)
    scores = torch.zeros(1, 1, 1, max(1, classes))
    scores[..., int(pixels[:classes].argmax()) if classes else 0] = 1
    for sample in split.queries.samples(split.asked, split.class_ids):
        if sample.mask is not None:
            for name in SEGMENTATIONS:
                tally.masks(name, scores, [sample])
        if sample.depth is not None:
            for name in DEPTHS:
                tally.depth(name, torch.full((1, 1, 1), total / known), [sample])
    return tally.results(split, split.details)


@dataclass
class Known:
    """What the reference says, a row an image, and the patches that vote in context.

    Attributes:
        tokens: float16 [n, h, w, D].
        cls: float32 [n, D].
        masks: uint8 [n, 4 h, 4 w].
        depths: float32 [n, h, w].
        voters: float32 [T, D], before they are of length 1.
        shares: float32 [T, K].
    """

    tokens: Tensor
    cls: Tensor
    masks: Tensor
    depths: Tensor
    voters: Tensor
    shares: Tensor


def _known(encoder: Encoder, split: Split, settings: DenseSettings) -> Known:
    import torch

    from pipeline.evaluate.dense.fit import UPSAMPLING, sampled
    from pipeline.use.segment import class_shares

    parts: dict[str, list[Tensor]] = {name: [] for name in Known.__dataclass_fields__}
    generator = torch.Generator().manual_seed(settings.seed)
    grid, classes = encoder.grid, len(split.class_ids)
    voters = max(1, settings.memory_patches // len(split.rows))

    batches = encoder.batches(split.reference, split.rows, split.class_ids, settings.batch_size)
    for samples, tokens, cls in batches:
        parts["tokens"].append(tokens.half())
        parts["cls"].append(cls.float())
        for sample, one in zip(samples, tokens, strict=True):
            if sample.depth is not None:
                parts["depths"].append(sampled(torch.from_numpy(sample.depth), grid))
            if sample.mask is not None:
                mask = torch.from_numpy(sample.mask)
                parts["masks"].append(sampled(mask, UPSAMPLING * grid, VOID).to(torch.uint8))
                shares = class_shares(mask, (grid, grid), classes).flatten(0, 1)
                labelled = shares.sum(1).nonzero().flatten()
                drawn = torch.randperm(len(labelled), generator=generator)[:voters]
                parts["voters"].append(one.flatten(0, 1)[labelled[drawn]].float())
                parts["shares"].append(shares[labelled[drawn]])
    none = torch.zeros(0)
    return Known(**{name: torch.cat(part) if part else none for name, part in parts.items()})


def _segmentations(
    known: Known, classes: int, settings: DenseSettings, device: str
) -> dict[str, Segment]:
    from torch.nn import functional as F

    from pipeline.evaluate.dense.segmentation import SCHEDULE, LinearClasses
    from pipeline.use.segment import Reference

    schedule = replace(SCHEDULE, seed=settings.seed)
    patches, masks = known.tokens.to(device), known.masks.to(device)
    linear = LinearClasses.fitted(patches, masks, classes, schedule)
    tokens = F.normalize(known.voters.to(device), dim=1)
    memory = Reference(tokens, known.shares.to(device))

    def nearest(patches: Tensor) -> Tensor:
        return memory.scores(patches, "nearest", NEIGHBOURS, TEMPERATURE)

    return {"linear": linear.scores, "nearest": nearest}


def _depths(known: Known, settings: DenseSettings, device: str) -> dict[str, Depths]:
    from pipeline.evaluate.dense.depth import LINEAR, SMALL, LinearDepth, Seen, SmallDepth, fitted

    seen, depths = Seen(known.tokens.to(device), known.cls.to(device)), known.depths.to(device)
    return {
        "linear": fitted(LinearDepth, seen, depths, replace(LINEAR, seed=settings.seed)),
        "head": fitted(SmallDepth, seen, depths, replace(SMALL, seed=settings.seed)),
    }


@dataclass
class _Tally:
    """What each scored image adds, by the name of the head; K classes."""

    classes: int
    confusions: dict[str, Counts] = field(default_factory=dict)
    overlaps: dict[str, list[Overlaps]] = field(default_factory=lambda: defaultdict(list))
    errors: dict[str, list[Errors]] = field(default_factory=lambda: defaultdict(list))

    def masks(self, name: str, scores: Tensor, samples: Sequence[Sample]) -> None:
        """Scores [B, h, w, K] of the patches of samples with masks, each at its own size."""
        import torch

        from pipeline.evaluate.dense.segmentation import confusion, overlaps
        from pipeline.use.segment import pixel_classes

        for one, sample in zip(scores, samples, strict=True):
            truth = torch.from_numpy(sample.mask).to(one.device)
            answer = pixel_classes(one[None], (truth.shape[0], truth.shape[1]))[0]
            counts = confusion(answer, truth, self.classes)
            self.overlaps[name].append(overlaps(counts))
            self.confusions[name] = counts + self.confusions.get(name, 0)

    def depth(self, name: str, depths: Tensor, samples: Sequence[Sample]) -> None:
        """Depths [B, H, W] of samples with depth, each brought to its own size."""
        import torch
        from torch.nn import functional as F

        from pipeline.evaluate.dense.depth import depth_errors

        for one, sample in zip(depths, samples, strict=True):
            truth = torch.from_numpy(sample.depth).to(one.device)
            answer = F.interpolate(one[None, None], truth.shape, mode="bilinear")[0, 0]
            self.errors[name].append(depth_errors(answer, truth))

    def results(self, split: Split, details: Mapping[str, Any]) -> Results:
        """By score name."""
        from pipeline.evaluate.dense.segmentation import class_ious

        results = {}
        for name, total in self.confusions.items():
            terms = np.stack(self.overlaps[name])
            score = Score(f"segmentation_{name}_miou", terms, split.ids, "mean_iou")
            ious = zip(split.class_ids, class_ious(total), strict=True)
            results[score.name] = Result.of(
                score,
                iou={str(one): None if np.isnan(iou) else float(iou) for one, iou in ious},
                pixel_accuracy=float(np.trace(total) / total.sum()),
                **details,
                **({"without_reference": split.unseen} if split.unseen else {}),
            )
        for name, errors in self.errors.items():
            sums = np.asarray(errors)
            for column, (error, statistic) in enumerate(ERRORS.items()):
                score = Score(f"depth_{name}_{error}", sums[:, [column, 3]], split.ids, statistic)
                results[score.name] = Result.of(score, **details)
        return results
