"""What a fine-tuning is told, and what follows from it: steps, rates. Plain numbers, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.schedule import StepValues, cosine

EPOCHS = 20.0  # where neither epochs nor steps are said
CLIP = 1.0  # gradient norm; stops the odd step of a fresh head, else above what a step has
BETAS = (0.9, 0.999)
SHOWN = {  # what is no field of the recipe's section
    "digest": "the weights of the model",
    "images": "the labelled images to train on",
    "mean": "augment.mean",
    "std": "augment.std",
}


@dataclass(frozen=True)
class Settings:
    """A fine-tuning but for its images and machines: with them equal, equal weights come out.

    Attributes:
        model: what is fine-tuned, for messages.
        digest: of its weights.
        from_scratch: they are drawn anew.
        tune: what learns beside the head.
        rank: of low-rank updates.
        steps: of the run.
        batch_size: images of a step, of all workers together.
        lr: at the end of the warm-up.
        layerwise_decay: factor per block.
        weight_decay: of AdamW.
        warmup: share of the steps.
        drop_path: stochastic depth.
        mixup: a of Beta(a, a), 0: off.
        label_smoothing: share.
        image_size: S, pixels.
        crop_scale: areas of random crops.
        flip: share of mirrored images.
        precision: of matrix products.
        seed: of all that is drawn.
        images: digest of the ids and labels that are trained on.
        mean: of each channel, for values in 0 to 1.
        std: of each channel.
    """

    model: str
    digest: str
    from_scratch: bool
    tune: Literal["all", "head", "low_rank"]
    rank: int
    steps: int
    batch_size: int
    lr: float
    layerwise_decay: float
    weight_decay: float
    warmup: float
    drop_path: float
    mixup: float
    label_smoothing: float
    image_size: int
    crop_scale: tuple[float, float]
    flip: float
    precision: Literal["float32", "bfloat16"]
    seed: int
    images: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def at(self, step: int) -> StepValues:
        """The rates of a step: a linear warm-up, then a cosine to 0."""
        # a step later than a pretraining has it: with few steps, one at a rate of 0 counts
        lr = cosine(step + 1, self.lr, 0.0, self.steps + 1, warmup=self.warmup_steps + 1)
        return StepValues(lr, self.weight_decay, 0.0, 0.0, last_layer_lr=lr)

    @property
    def warmup_steps(self) -> int:
        """Steps with a rising rate."""
        return round(self.warmup * self.steps)

    def differs(self, earlier: dict[str, Any]) -> list[str]:
        """What is not as in a checkpoint, `name: old -> new`; where the model is may change."""
        mine = {n: list(x) if isinstance(x, tuple) else x for n, x in asdict(self).items()}
        return [
            f"{SHOWN.get(name, f'finetune.{name}')}: {earlier.get(name)} -> {value}"
            for name, value in mine.items()
            if earlier.get(name) != value and name != "model"
        ]


def steps_of(epochs: float | None, steps: int | None, images: int, batch_size: int) -> int:
    """Steps of a run, of which a pass over the images has `steps_per_epoch`."""
    return steps or max(1, round((epochs or EPOCHS) * steps_per_epoch(images, batch_size)))


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Steps in which every image is used once at most; all of them where a batch holds them."""
    return max(1, images // batch_size)
