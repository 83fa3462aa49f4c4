"""What is asked of a model beside labelled scores: copies, patches, and scores without labels.

`probe` is the work of one task for a model. It asks about the images with the lowest ids, which
are the same ones for every model.

Shapes: N images of the table that are looked at, n images that are attacked, A copies of each,
D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.card.attacked import Attacked, Wanted, attacked
from pipeline.card.card import Result
from pipeline.card.sample import Sample
from pipeline.curate.threshold.attacks import ATTACKS
from pipeline.embed.embedders import EmbedderSpec, open_embedder
from pipeline.embed.vectors import VectorSet
from pipeline.errors import DataError
from pipeline.evaluate.health import effective_rank, feature_std
from pipeline.evaluate.neighbours.copies import copy_scores
from pipeline.evaluate.score import Score
from pipeline.evaluate.unlabelled import RANK_IMAGES, alignment, rank_me, uniformity
from pipeline.images.decode import MAX_PIXELS
from pipeline.shards.shard_set import ShardSet
from pipeline.uri import public

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = 256  # that are attacked: with nine copies of each a recall is known within 3 points
FEWEST_IMAGES = 64  # within 5 points
UNIFORMITY_IMAGES = 8192  # 34 million pairs


@dataclass(frozen=True)
class Probe:
    """What is asked of one model; small, sent to a task.

    Attributes:
        vectors: its table.
        spec: the model; None where there are vectors alone.
        shards: the images that the table is of; None likewise.
        outputs: columns of the table that copies are looked for in: `cls`; of one model
            `pixels` and `colours` too, the baselines.
        groups: `copies`, `unlabelled` or both, as `evaluate.scores` names them.
        attacks: whether copies are made. That takes as long as embedding nine images for each of
            the sample; without, there is no copy detection and no `alignment`, as for a network
            that a model is only measured against.
        images: that are attacked, and whose patches are looked at; None: 256, or for few images
            so many that their copies are no more than the images, but 64 at least.
        max_pixels: larger images are refused.
        gpu: the task has one.
    """

    vectors: VectorSet
    spec: EmbedderSpec | None = None
    shards: ShardSet | None = None
    outputs: tuple[str, ...] = ("cls",)
    groups: tuple[str, ...] = ("copies", "unlabelled")
    attacks: bool = True
    images: int | None = None
    max_pixels: int = MAX_PIXELS
    gpu: bool = False

    @property
    def sample(self) -> int:
        """Images that are attacked."""
        usual = min(IMAGES, max(FEWEST_IMAGES, self.vectors.rows // len(ATTACKS)))
        return usual if self.images is None else self.images


@dataclass(frozen=True)
class Probed:
    """What a model says.

    Attributes:
        results: of each output, by score name. `pixels` and `colours` have copy detection alone.
        bad: images of the sample that could not be decoded; no score is of them.
        remarks: sentences on what is missing, and why.
    """

    results: dict[str, dict[str, Result]]
    bad: int = 0
    remarks: tuple[str, ...] = ()


def probe(asked: Probe) -> Probed:
    """Asks a model.

    The scores of `cls` are `copies_recall1` and `copies_map`; `rank_me`, `feature_std` and
    `effective_rank` of at most 25,600 images, `uniformity` of at most 8,192; `alignment` and
    `patch_smoothness` of those that are attacked. Copies are looked for among the 25,600.

    Raises:
        PipelineError: the model cannot be opened or is not that of the table, or storage failed.
    """
    import torch

    device = "cuda" if asked.gpu and torch.cuda.is_available() else "cpu"
    database = Sample.of(asked.vectors, RANK_IMAGES)
    answers, remarks = _attacked(asked, database, device)
    results = {
        output: _results(output, asked, database, answers, device) for output in asked.outputs
    }
    if "unlabelled" in asked.groups and len(database) < 2:
        remarks.append("one image has no rank and no spread")
    if answers and answers.bad:
        remarks.append(
            f"{answers.bad:,} of {answers.bad + len(answers.kept):,} images could not be decoded "
            "a second time and are in no score of copies or patches"
        )
    return Probed(results, answers.bad if answers else 0, tuple(remarks))


def _attacked(asked: Probe, database: Sample, device: str) -> tuple[Attacked | None, list[str]]:
    """What the model gives of the sample, and what there is to say about it."""
    if asked.spec is None or asked.shards is None:
        lacks = "copy detection, alignment and smoothness of patches"
        said = f"vectors were given and no images, so there is no {lacks}"
        return None, [said] if asked.attacks else []
    embedder = open_embedder(asked.spec, asked.gpu)
    facts = asked.vectors.facts
    if (asked.spec.digest, embedder.size) != (facts["digest"], facts["image_size"]):
        raise DataError(
            f"{public(asked.vectors.uri)} holds vectors of {facts['model']} at "
            f"{facts['image_size']} pixels, {asked.spec.name} at {embedder.size} pixels was asked",
            "embed the images with the model that is to be scored",
        )
    outputs = asked.outputs if asked.attacks else ()
    smoothness = "unlabelled" in asked.groups and "cls" in asked.outputs
    probing = Wanted(outputs, smoothness, asked.max_pixels, device)
    answers = attacked(embedder, asked.shards, database.first(asked.sample), probing)
    return answers, []


def _results(
    output: str, asked: Probe, database: Sample, answers: Attacked | None, device: str
) -> dict[str, Result]:
    """All scores of one output."""
    import torch

    features = torch.from_numpy(database.read(asked.vectors, output)).to(device)
    unlabelled = "unlabelled" in asked.groups and output == "cls"
    results = of_features(features) if unlabelled and len(features) > 1 else {}
    if answers is None or not len(answers.kept):
        return results
    ids = database.digests
    own = ids[answers.kept]
    if output in answers.copies:
        copies = torch.from_numpy(answers.copies[output]).to(device)
        if output == "pixels":  # whose cosines are all near 1 with the mean in them
            mean = features.mean(0)
            features, copies = features - mean, copies - mean
        if "copies" in asked.groups:
            for score, details in copy_scores(features, ids, copies, own, tuple(ATTACKS)):
                results[score.name] = Result.of(score, **details)
        if unlabelled:
            originals = features[torch.from_numpy(answers.kept).to(device)]
            results["alignment"] = _alignment(originals, copies, own)
    if unlabelled and answers.smoothness is not None:
        score = Score.of_hits("patch_smoothness", answers.smoothness, own)
        results["patch_smoothness"] = Result.of(score, images=len(own))
    return results


def of_features(features: Tensor) -> dict[str, Result]:
    """Scores of features [N, D] alone, N >= 2: numbers without an interval."""
    about = {"images": len(features), "dims": features.shape[1]}
    first = features[:UNIFORMITY_IMAGES]
    return {
        "rank_me": Result.alone(rank_me(features), **about, highest=min(features.shape)),
        "feature_std": Result.alone(float(feature_std(features)), **about),
        "effective_rank": Result.alone(float(effective_rank(features)), **about),
        "uniformity": Result.alone(uniformity(first), **about | {"images": len(first)}),
    }


def _alignment(originals: Tensor, copies: Tensor, ids: object) -> Result:
    distances = alignment(originals, copies).cpu()
    score = Score.of_hits("alignment", distances.mean(1).numpy(), ids)  # type: ignore[arg-type]
    each = dict(zip(ATTACKS, distances.mean(0).tolist(), strict=True))
    return Result.of(score, images=len(originals), attacks=each)
