"""A student that learns the features of any frozen network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipeline.api.networks import network_of
from pipeline.embed.teacher import teacher_of
from pipeline.model.encoders.frozen import FeatureTeacher
from pipeline.model.foreign import TimmSpec
from pipeline.model.pair import Backbone, HeadSpec, Pair, build_pair
from pipeline.model.vit import BackboneSpec
from pipeline.train.distil.features import FeatureSpec, attach
from pipeline.views.photometric import PhotometricSpec


def feature_teacher(
    model: str,
    image_size: int | None = None,
    mean: Sequence[float] = PhotometricSpec.mean,
    std: Sequence[float] = PhotometricSpec.std,
    device: str = "cpu",
    threads: int = 1,
) -> FeatureTeacher:
    """A frozen network for the views of a student.

    Args:
        model: a run, weights, `timm:<name>` or a .onnx file, as for `embedder_of`.
        image_size: side of the images that it is shown, pixels; default: its own.
        mean: of each channel, with which the student's views are normalised.
        std: likewise.
        device: where onnxruntime computes, `cpu` or `cuda`; torch's networks are moved with
            `pair.to(device)`.
        threads: of onnxruntime on a CPU.

    Raises:
        PipelineError: there is no such model, or it does not fit these images.
    """
    return teacher_of(model, image_size).open(mean, std, device, threads)


def distilled_student(
    backbone: str | BackboneSpec | TimmSpec | Backbone | nn.Module,
    teacher: FeatureTeacher,
    features: FeatureSpec | None = None,
    *,
    head: HeadSpec | None = None,
    ibot_head: HeadSpec | None = None,
    seed: int = 0,
    width: int | None = None,
) -> Pair:
    """A student with an adapter to a teacher's features, and its moving average.

    Args:
        backbone: of the student, as for `student_teacher`.
        teacher: see `feature_teacher`.
        features: what is learnt of them, the same as in `ObjectiveSpec(features=…)`.
        head: of our own objective beside it; None: no heads.
        ibot_head: of iBOT's own, where there is a head; None shares it.
        seed: of the random weights that are made here.
        width: D of a module of your own; default: what it gives for one image of 224 x 224.

    Raises:
        PipelineError: no such backbone, or nothing that could be learnt.
    """
    network = network_of(backbone, seed=seed, width=width)
    pair = build_pair(network, head, ibot_head if head else None, seed)
    return attach(pair, teacher, features or FeatureSpec(), seed)
