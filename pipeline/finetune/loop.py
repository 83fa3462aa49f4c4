"""Fine-tuning as an algorithm: `fit` from step to step, `answers` at its end. No Ray, no files.

One worker or several (DDP) compute the same: a step is of the same images, each with the same
crop, and its loss is a sum over images divided by how many they are.

Shapes: B images of a step on this worker, K classes, n queries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import TrainError
from pipeline.evaluate.features import inference, normalise
from pipeline.finetune.classifier import Classifier
from pipeline.finetune.images import Batch, LabelledImages
from pipeline.finetune.settings import BETAS, CLIP, Settings
from pipeline.loss.collectives import all_sum, world_size
from pipeline.model.foreign import ForeignBackbone
from pipeline.model.groups import apply_values, parameter_groups
from pipeline.stream.order import keyed
from pipeline.train.checkpoint.names import divided, optimizer_state, prepare_optimizer

Array = np.ndarray[Any, Any]
SAVES = 20  # of a run, about, where it has as many epochs


class Watch(Protocol):
    """What is done beside the steps."""

    def stop(self) -> bool:
        """Whether this worker was asked to end."""

    def step(self, done: int, scalars: dict[str, float]) -> None:
        """After each step; `done` counts it."""

    def save(self, done: int) -> None:
        """At the end of an epoch, some twenty times a run; after the last step or an early end."""


@dataclass
class Trainee:
    """What learns: the classifier, its optimiser, where and how it computes.

    Attributes:
        classifier: on its device.
        settings: of the fine-tuning.
        rank: of this worker, a part of the keys of stochastic depth.
        network: the classifier, in DDP where there are several workers.
        optimizer: AdamW over the groups of `parameter_groups`.
    """

    classifier: Classifier
    settings: Settings
    rank: int = 0

    def __post_init__(self) -> None:
        """Makes the optimiser, and DDP where a group of workers has begun."""
        classifier, settings = self.classifier, self.settings
        self.device = next(classifier.parameters()).device
        groups = parameter_groups(classifier, settings.layerwise_decay, 1.0)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS)
        self.network: nn.Module = classifier
        if world_size() > 1:
            on_gpu = self.device.type == "cuda"
            self.network = nn.parallel.DistributedDataParallel(
                classifier,
                device_ids=[self.device.index] if on_gpu else None,
                # some models of timm have weights that their features do not use
                find_unused_parameters=isinstance(classifier.backbone, ForeignBackbone),
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return torch.bfloat16 if self.settings.precision == "bfloat16" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around a forward pass."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def state(self) -> dict[str, Any]:
        """What has been learnt so far, and the optimiser: all that a restart needs."""
        learnt = {name for name, p in self.classifier.named_parameters() if p.requires_grad}
        learnt |= {name for name, _ in self.classifier.named_buffers()}
        every = self.classifier.state_dict()
        return {
            "classifier": {name: x for name, x in every.items() if name in learnt},
            "optimizer": optimizer_state(self.optimizer),
        }

    def live(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint of these names fills in place.

        Raises:
            TrainError: it holds others.
        """
        paths = [name.split("/") for name in names]
        prepare_optimizer(self.optimizer, {path[1] for path in paths if path[0] == "optimizer"})
        tensors = divided(self.state())[0]
        if unknown := [path[1] for path in paths if "/".join(path) not in tensors]:
            raise TrainError(
                f"the checkpoint holds {unknown[0]}, which this network has not",
                "give this run another name",
            )
        return tensors

    def take(self, state: dict[str, Any]) -> None:
        """Nothing is left that `live` does not have."""

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave, into a trainee that was made in the same way."""
        tensors = divided(state)[0]
        for name, target in self.live(tensors).items():
            target.copy_(tensors[name])


def fit(trainee: Trainee, images: LabelledImages, first: int, watch: Watch) -> int:
    """Trains from a step on; gives the steps done, fewer than all of them after a stop.

    Args:
        trainee: as it was at that step.
        images: that it learns from.
        first: steps done before.
        watch: told of each step.

    Raises:
        TrainError: a loss or a gradient is not finite; no worker has made that update.
    """
    settings, epoch = trainee.settings, images.steps_per_epoch
    save_every = epoch * max(1, round(settings.steps / epoch / SAVES))
    trainee.classifier.learning(True)
    for step, batch in enumerate(images.batches(first, settings.steps), first):
        apply_values(trainee.optimizer, settings.at(step))
        scalars, stop = train_step(trainee, batch, step, watch.stop())
        done = step + 1
        watch.step(done, scalars)
        if stop or done % save_every == 0 or done == settings.steps:
            watch.save(done)
        if stop:
            return done
    return settings.steps


def train_step(
    trainee: Trainee, batch: Batch, step: int, stop: bool = False
) -> tuple[dict[str, float], bool]:
    """One update, at the rates that the optimiser has; the numbers of the step, over all workers,
    and whether any worker was asked to end.
    """
    settings, device = trainee.settings, trainee.device
    x = normalise(batch.images, settings.mean, settings.std, device)
    labels = torch.from_numpy(batch.labels).to(device)
    weights = torch.from_numpy(batch.weights).to(device)
    own, partner = (torch.from_numpy(rows).to(device) for rows in (batch.own, batch.partner))
    share = torch.from_numpy(batch.share).to(device)

    if settings.mixup:
        mixed = share[:, None, None, None] * x[own] + (1 - share)[:, None, None, None] * x[partner]
    else:
        mixed = x[own]
    with trainee.autocast():
        logits = trainee.network(mixed, _generator(trainee, step))
    loss = share * weights[own] * _loss(logits, labels[own], settings)
    if settings.mixup:
        loss = loss + (1 - share) * weights[partner] * _loss(logits, labels[partner], settings)

    trainee.optimizer.zero_grad(set_to_none=True)
    # DDP takes the mean of the workers' gradients; together they are those of the batch's mean.
    (loss.sum() * (world_size() / batch.whole)).backward()  # type: ignore[no-untyped-call]
    learnt = [p for p in trainee.classifier.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(learnt, CLIP)

    right = weights[own] * (logits.detach().argmax(1) == labels[own])
    sums = torch.stack(
        [loss.detach().sum(), right.sum(), weights[own].sum(), norm.new_tensor(stop)]
    )
    total, hits, count, stops = all_sum(sums.float()).tolist()
    if not np.isfinite(total) or not np.isfinite(float(norm)):
        raise TrainError(
            f"step {step}: the loss is {total / batch.whole:g} and the gradient's norm "
            f"{float(norm):g}; stopped before the update",
            "start again under another run.name with a lower finetune.lr, a longer "
            "finetune.warmup or finetune.precision=float32",
        )
    trainee.optimizer.step()
    return {
        "loss/finetune": total / batch.whole,
        "finetune/train_top1": hits / max(1.0, count),
        "optim/grad_norm": float(norm),
        "optim/lr": settings.at(step).lr,
    }, stops > 0


def _loss(logits: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """Cross-entropy [B] in float32."""
    smoothing = settings.label_smoothing
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)


def _generator(trainee: Trainee, step: int) -> torch.Generator | None:
    """Of stochastic depth, whose draws depend on the step and the worker."""
    if not trainee.settings.drop_path:
        return None
    key = keyed(trainee.settings.seed, step, trainee.rank, "drop_path")
    return torch.Generator().manual_seed(int(key.integers(2**63)))


def answers(
    classifier: Classifier, batches: Iterable[tuple[Array, Array]], settings: Settings
) -> tuple[Array, Array]:
    """The classes that a classifier says.

    Args:
        classifier: on its device; its modes are as before afterwards.
        batches: of `LabelledImages.centre_crops`.
        settings: for mean, deviation and precision.

    Returns:
        rows int64 [n] of the images, and their classes int64 [n].
    """
    device = next(classifier.parameters()).device
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    rows, classes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    with inference(classifier, device, dtype):
        for images, at in batches:
            logits = classifier(normalise(images, settings.mean, settings.std, device))
            rows.append(at)
            classes.append(logits.argmax(1).cpu().numpy())
    return np.concatenate(rows), np.concatenate(classes)
