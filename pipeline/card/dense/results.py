"""Dense scores of a model, and of what it is compared with: a Ray task for each.

A whole image is resized to the model's square, nothing is cut off. Masks and depth maps keep their
own size: scores of patches are upsampled to it, bilinear, and each known pixel counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.card.card import Role
from pipeline.card.dense.encoder import model_encoder, pixel_encoder
from pipeline.card.dense.scores import Results, constant_scores, scored
from pipeline.card.dense.sets import DenseSet
from pipeline.card.dense.split import DenseSettings, Split
from pipeline.embed.embedders import EmbedderSpec
from pipeline.embed.pool import as_ours

GRID = 28  # patches a side of raw pixels, where no model says
DEFAULT = DenseSettings()


def dense_results(
    spec: EmbedderSpec,
    dense: DenseSet,
    queries: DenseSet | None = None,
    settings: DenseSettings = DEFAULT,
) -> Results:
    """All dense scores that the sets allow, of one model, in one Ray task.

    Args:
        spec: of a model that gives patches.
        dense: what heads are fitted to, and patches vote.
        queries: what is scored; None: a part of `dense` is held out, by a hash of the images.
        settings: of both.

    Returns:
        `segmentation_linear_miou` and `segmentation_nearest_miou` where there are masks;
        `depth_linear_rmse`, `…_rel`, `…_delta1` and `depth_head_rmse`, … where there is depth.
        Details say the IoU of each class, the pixel accuracy, and what was fitted to what.

    Raises:
        PipelineError: the model gives no patches, or takes no images of this size or channels; the
            sets do not fit each other.
    """
    return _in_a_task(settings, model_results, spec, dense, queries, settings)


def dense_baselines(
    dense: DenseSet,
    queries: DenseSet | None = None,
    settings: DenseSettings = DEFAULT,
    grid: int = GRID,
) -> dict[Role, Results]:
    """The same scores of raw pixels (4 x 4 pixels of each patch and its place), and of a constant:
    the most frequent class, or the mean depth.

    Args:
        dense: as for `dense_results`.
        queries: likewise.
        settings: likewise.
        grid: patches a side; `details["grid"]` of the model that they stand beside.
    """
    pixels = _in_a_task(settings, pixel_results, dense, queries, settings, grid)
    constant = _in_a_task(settings, constant_results, dense, queries, settings)
    return {"raw_pixels": pixels, "majority": constant}


def _in_a_task(settings: DenseSettings, function: Callable[..., Results], *inputs: Any) -> Results:
    import ray
    from ray.exceptions import RayTaskError

    task = ray.remote(function).options(num_cpus=1, num_gpus=int(settings.gpu))
    try:
        results: Results = ray.get(task.remote(*inputs))
    except RayTaskError as error:
        raise as_ours(error, "dense scores") from error
    return results


def model_results(
    spec: EmbedderSpec, dense: DenseSet, queries: DenseSet | None, settings: DenseSettings
) -> Results:
    """`dense_results` in this process."""
    split = Split.of(dense, queries, settings)
    encoder = model_encoder(spec, settings.size, settings.batch_size, settings.gpu)
    return scored(encoder, split, settings)


def pixel_results(
    dense: DenseSet, queries: DenseSet | None, settings: DenseSettings, grid: int
) -> Results:
    """The raw pixels of `dense_baselines` in this process."""
    return scored(pixel_encoder(grid), Split.of(dense, queries, settings), settings)


def constant_results(dense: DenseSet, queries: DenseSet | None, settings: DenseSettings) -> Results:
    """The constants of `dense_baselines` in this process."""
    return constant_scores(Split.of(dense, queries, settings))
