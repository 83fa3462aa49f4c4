"""The pieces from Python, without Ray or config. Start at `networks.py`.

`train`, `finetune` and `evaluate` need both: they are a whole chain as one call.

    from pipeline import api

    student, teacher = api.build_student_teacher(image_size=224, patch_size=14, embed_dim=384)
    trained = api.train("photos/", out="runs/photos")

docs/python.md shows each piece at work. Everything here has the same behaviour as in a run, because
a run is made of it.
"""

from __future__ import annotations

from pipeline.api.distil import distilled_student, feature_teacher
from pipeline.api.evaluate import evaluate
from pipeline.api.finetune import Finetuned, finetune
from pipeline.api.images import embed, multi_crop, prepare
from pipeline.api.losses import dino_loss, update_centre, update_teacher
from pipeline.api.networks import (
    build_student_teacher,
    output_size,
    sized,
    student_teacher,
    with_head,
)
from pipeline.api.start import start
from pipeline.api.train import Trained, train
from pipeline.config.sizes import SIZES
from pipeline.embed.embedders import Embedder, embedder_of, open_embedder
from pipeline.embed.vectors import open_vectors
from pipeline.evaluate.classifiers.few_shot import few_shot_scores
from pipeline.evaluate.classifiers.logistic import logistic_scores
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.neighbours.knn import knn_scores
from pipeline.evaluate.neighbours.nearest import Neighbours, SameImages, nearest
from pipeline.evaluate.neighbours.retrieval import retrieval_scores
from pipeline.evaluate.score import Interval, Score, difference
from pipeline.evaluate.unlabelled import rank_me
from pipeline.loss.centre import Centre
from pipeline.loss.ibot import ibot_loss, patch_weights
from pipeline.loss.koleo import koleo
from pipeline.loss.target import Target, sinkhorn_targets, softmax_targets
from pipeline.model.encoders.module import ModuleBackbone
from pipeline.model.fit import fit
from pipeline.model.foreign import TimmSpec
from pipeline.model.groups import apply_values, parameter_groups
from pipeline.model.head import Head
from pipeline.model.pair import Encoded, Encoder, HeadSpec, Pair, ema_update, freeze, pair_of
from pipeline.model.vit import BackboneSpec, VisionTransformer
from pipeline.model.weights import load_backbone, read_weights, save_backbone
from pipeline.schedule import StepValues, cosine, linear
from pipeline.search.search import open_search
from pipeline.train.distil.features import FeatureSpec
from pipeline.train.objective import Objective, ObjectiveSpec
from pipeline.train.step import Forward, NonFinite, StepResult, forward, train_step
from pipeline.use.attention import attention
from pipeline.use.components import components
from pipeline.use.network import patch_maps
from pipeline.use.segment import segment, similarity
from pipeline.views.batch import Views
from pipeline.views.crops import CropSpec
from pipeline.views.masks import MaskSpec, masks_for
from pipeline.views.photometric import PhotometricSpec

__all__ = [
    # networks
    "SIZES",
    "BackboneSpec",
    "TimmSpec",
    "HeadSpec",
    "sized",
    "build_student_teacher",
    "student_teacher",
    "with_head",
    "output_size",
    "VisionTransformer",
    "ModuleBackbone",
    "Head",
    "Encoder",
    "Encoded",
    "Pair",
    "pair_of",
    "freeze",
    "ema_update",
    "update_teacher",
    # a frozen network whose features are learnt
    "feature_teacher",
    "distilled_student",
    "FeatureSpec",
    # weights
    "load_backbone",
    "save_backbone",
    "read_weights",
    "fit",
    # losses and targets
    "dino_loss",
    "ibot_loss",
    "patch_weights",
    "koleo",
    "Centre",
    "update_centre",
    "Target",
    "softmax_targets",
    "sinkhorn_targets",
    "masks_for",
    "MaskSpec",
    # images
    "CropSpec",
    "PhotometricSpec",
    "multi_crop",
    "prepare",
    "embed",
    # a backbone in use
    "Embedder",
    "embedder_of",
    "open_embedder",
    "open_vectors",
    "open_search",
    "patch_maps",
    "attention",
    "components",
    "similarity",
    "segment",
    # how good it is
    "evaluate",
    "LabelledFeatures",
    "nearest",
    "Neighbours",
    "SameImages",
    "knn_scores",
    "logistic_scores",
    "few_shot_scores",
    "retrieval_scores",
    "rank_me",
    "Score",
    "Interval",
    "difference",
    # training
    "start",
    "train",
    "Trained",
    "finetune",
    "Finetuned",
    "forward",
    "Forward",
    "Views",
    "Objective",
    "ObjectiveSpec",
    "StepValues",
    "cosine",
    "linear",
    "parameter_groups",
    "apply_values",
    "train_step",
    "StepResult",
    "NonFinite",
]
