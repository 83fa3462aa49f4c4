"""The loop against a plain one, on two workers, interrupted, and where a loss is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.errors import TrainError
from pipeline.finetune.classifier import Classifier
from pipeline.finetune.images import LabelledImages, Worker
from pipeline.finetune.loop import Trainee, answers, fit
from pipeline.views.crops import resize_centre_crop
from tests.finetune.small import classifier, images, pixels, rows, settings, shards


class Watch:
    """Keeps what it is told; asks to stop after some steps."""

    def __init__(self, last: int = -1, save: Callable[[int], None] = lambda done: None) -> None:
        self.last, self.saved, self.scalars = last, save, list[dict[str, float]]()

    def stop(self) -> bool:
        return len(self.scalars) + 1 == self.last

    def step(self, done: int, scalars: dict[str, float]) -> None:
        assert done == len(self.scalars) + 1 or self.last < 0
        self.scalars.append(scalars)

    def save(self, done: int) -> None:
        self.saved(done)


def trained(folder: Path, worker: Worker | None = None, **changes: Any) -> tuple[Trainee, Watch]:
    watch = Watch()
    trainee = Trainee(classifier(**changes), settings(**changes), worker.rank if worker else 0)
    assert fit(trainee, images(shards(folder), worker, **changes), 0, watch) == 6
    return trainee, watch


def weights(one: Classifier) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in one.state_dict().items()}


def assert_close(one: dict[str, Any], other: dict[str, Any], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], atol=atol, rtol=0)


def plain_loop(found: LabelledImages, mixup: float, smoothing: float) -> tuple[Classifier, list]:
    """The same, image by image and with one group for each weight."""
    network = classifier()
    layers = {name: _layer(name) for name, p in network.named_parameters() if p.requires_grad}
    named = {n: p for n, p in network.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([{"params": [p]} for p in named.values()], betas=(0.9, 0.999))
    losses = []
    for step, batch in enumerate(found.batches(0, 6)):
        lr = 1e-2 * (step + 1) / 2 if step < 2 else 5e-3 * (1 + math.cos(math.pi * (step - 2) / 4))
        for group, name in zip(optimizer.param_groups, named, strict=True):
            group["lr"] = lr * 0.5 ** (3 - layers[name])
            fixed = name.endswith(".bias") or "norm" in name or "gamma" in name
            group["weight_decay"] = 0.0 if fixed else 0.05
        x = (torch.from_numpy(batch.images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        total = torch.zeros(())
        for own, partner, share in zip(batch.own, batch.partner, batch.share, strict=True):
            lam = float(share) if mixup else 1.0
            logits = network((lam * x[own] + (1 - lam) * x[partner])[None])[0]
            target = torch.full((2,), smoothing / 2)
            target[batch.labels[own]] += (1 - smoothing) * lam
            target[batch.labels[partner]] += (1 - smoothing) * (1 - lam)
            total = total - (target * logits.log_softmax(0)).sum()
        loss = total / len(batch.own)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in named.values()))
        for p in named.values():
            p.grad *= min(1.0, 1.0 / norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return network, losses


def _layer(name: str) -> int:
    if "blocks." in name:
        return int(name.split(".")[2]) + 1
    first = ("pos_embed", "patch_embed", "cls_token", "register_tokens")
    return 0 if name.split(".")[1] in first else 3


@pytest.mark.parametrize(("mixup", "smoothing"), [(0.0, 0.0), (0.8, 0.2)])
def test_it_is_a_plain_loop(tmp_path: Path, mixup: float, smoothing: float) -> None:
    changes = {"mixup": mixup, "label_smoothing": smoothing}
    trainee, watch = trained(tmp_path, **changes)
    expected, losses = plain_loop(images(shards(tmp_path), **changes), mixup, smoothing)
    found = [scalars["loss/finetune"] for scalars in watch.scalars]
    np.testing.assert_allclose(found, losses, atol=1e-5)
    assert_close(weights(trainee.classifier), weights(expected), atol=2e-5)
    assert found[-1] < found[0]


@pytest.mark.parametrize("tune", ["head", "low_rank"])
def test_what_does_not_learn_stays_as_it_was(tmp_path: Path, tune: str) -> None:
    trainee, _ = trained(tmp_path, tune=tune, drop_path=0.5)
    before = weights(classifier(tune=tune))
    changed = {n for n, x in weights(trainee.classifier).items() if not torch.equal(x, before[n])}
    learnt = {n for n, p in trainee.classifier.named_parameters() if p.requires_grad}
    assert changed == learnt


@pytest.mark.parametrize("tune", ["all", "low_rank"])
def test_interrupted_it_ends_as_if_it_had_not_been(tmp_path: Path, tune: str) -> None:
    changes = {"tune": tune, "mixup": 0.5, "drop_path": 0.5 * (tune == "all")}
    whole, _ = trained(tmp_path, **changes)
    first = Trainee(classifier(**changes), settings(**changes))
    kept: dict[int, Any] = {}
    # stopped within an epoch: nobody asked for a checkpoint there but the stop
    watch = Watch(4, lambda done: kept.update({done: first.state()}))
    assert fit(first, images(shards(tmp_path), **changes), 0, watch) == 4
    torch.save(kept[4], tmp_path / "state.pt")
    later = Trainee(classifier(**changes), settings(**changes))
    later.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert fit(later, images(shards(tmp_path), **changes), 4, Watch()) == 6
    assert_close(weights(later.classifier), weights(whole.classifier), atol=0)


def test_a_loss_that_is_not_finite_ends_it_before_the_update(tmp_path: Path) -> None:
    trainee = Trainee(classifier(), settings())
    with torch.no_grad():
        trainee.classifier.head.bias[0] = math.nan
    before = weights(trainee.classifier)
    with pytest.raises(TrainError, match="step 0: the loss is nan") as error:
        fit(trainee, images(shards(tmp_path)), 0, Watch())
    assert "finetune.lr" in error.value.hint
    for name, x in weights(trainee.classifier).items():
        assert torch.equal(x, before[name]) or name == "head.bias"


def test_a_bad_image_adds_nothing_and_the_others_count_as_before(tmp_path: Path) -> None:
    trainee = Trainee(classifier(), settings(steps=1, batch_size=12))
    found = images(shards(tmp_path), steps=1, batch_size=12)
    whole = next(iter(found.batches(0, 1)))
    whole.weights[3] = 0.0
    found.batches = lambda first, last: iter([whole])  # type: ignore[method-assign, assignment]
    watch = Watch()
    fit(trainee, found, 0, watch)
    logits = classifier()((torch.from_numpy(whole.images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)
    each = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(whole.labels), reduction="none"
    )
    others = float((each.sum() - each[3]).detach())
    assert watch.scalars[0]["loss/finetune"] == pytest.approx(others / 12, abs=1e-6)


def test_answers_are_the_largest_logits_of_centre_crops(tmp_path: Path) -> None:
    found = shards(tmp_path)
    network = trained(tmp_path)[0].classifier.train()  # which tells the two classes apart
    asked = LabelledImages(found, rows(found), settings(), Worker(), 0)
    at, classes = answers(network, asked.centre_crops(5), settings())
    assert network.training and at.tolist() == list(range(12))
    crops = np.stack([resize_centre_crop(pixels(number), 8) for number in range(12)])
    x = (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    assert classes.tolist() == network.eval()(x).argmax(1).tolist()
    assert len(set(classes.tolist())) == 2


TWO = [{}, {"tune": "low_rank"}, {"mixup": 0.8, "batch_size": 5}]


def on_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    try:
        out = []
        for changes in TWO:
            trainee, watch = trained(Path(folder) / str(rank), Worker(rank, 2), **changes)
            out.append((weights(trainee.classifier), watch.scalars))
        # one is asked to stop: both do
        trainee, watch = Trainee(classifier(), settings(), rank), Watch(3 if rank else -1)
        found = images(shards(Path(folder) / str(rank)), Worker(rank, 2))
        out.append(fit(trainee, found, 0, watch))
        torch.save(out, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.long
def test_two_workers_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    mp.spawn(on_two, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for changes, first, second in zip(TWO, one, other, strict=False):
        assert_close(first[0], second[0], atol=0)
        alone, watch = trained(tmp_path, **changes)
        assert_close(first[0], weights(alone.classifier), atol=1e-5)
        for here, there in zip(watch.scalars, first[1], strict=True):
            assert there == pytest.approx(here, abs=1e-5)
    assert one[-1] == other[-1] == 3
