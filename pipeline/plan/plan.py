"""Everything that follows from a recipe, the data set and the machines, computed in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipeline.config.config import Config
from pipeline.errors import ConfigError, PlacementError
from pipeline.plan.layout import (
    Arrangement,
    Machine,
    arrange_largest,
    feeder_share,
    group_sizes,
    no_room,
    shown,
    worker_share,
)
from pipeline.plan.nodes import Node, Share
from pipeline.plan.portions import chunk_of, window_of
from pipeline.schedule import Schedules, StepValues


class Plan(BaseModel):
    """A resolved run: the recipe and what was derived from it. Printed, logged and checkpointed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Config
    images: int
    digest: str
    layout: str = ""  # of the row groups: another one is another reading order
    class_names: tuple[str, ...]
    device: Literal["cpu", "cuda"]
    workers: int  # of the first group; a later one may have another of the sizes
    sizes: tuple[int, ...]  # numbers of workers that a group may have, ascending
    steps: int
    steps_per_pass: int
    dropped_per_pass: int
    worker_batch: int
    micro_batch: int
    accumulation: int  # micro batches of a worker in a step
    chunk_images: int
    window_images: int
    lr: float
    warmup_steps: int
    freeze_last_layer_steps: int
    temperature_warmup_steps: int
    precision: Literal["float32", "bfloat16"]
    precision_reason: str
    compile: bool
    eval_every: int
    save_every: int
    cpus_per_worker: float
    gpus_per_worker: float
    feeder_cpus: float
    decode_cpus: float
    decode_tasks: int
    threads: int
    streams: int = 1  # of data for the first group; a group on other nodes has others
    value_range: Literal["full"] | tuple[float, float] | None = None  # of deep images; None: full
    init: str = ""  # the very checkpoint or file that model.init meant when the run began
    frozen_teacher: str = ""  # the same of distill.teacher
    encoder_files: dict[str, str] = {}  # text of model.encoder=module:…, by the file's name
    teacher_digest: str = ""  # of its weights, where its features are learnt
    distil_loss: Literal["", "targets", "cosine", "smooth_l1"] = ""  # that distill.loss means
    distil_reason: str = ""  # why auto did not mean targets

    @property
    def schedules(self) -> Schedules:
        """What the learning rate and the other scheduled values of a step follow from."""
        optim, teacher = self.config.optim, self.config.teacher
        return Schedules(
            steps=self.steps,
            lr=self.lr,
            min_lr=optim.min_lr,
            warmup_steps=self.warmup_steps,
            weight_decay=(optim.weight_decay, optim.weight_decay_end),
            momentum=(teacher.momentum, teacher.momentum_end),
            temperature=(teacher.temperature, teacher.temperature_end),
            temperature_warmup_steps=self.temperature_warmup_steps,
            freeze_last_layer_steps=self.freeze_last_layer_steps,
            freeze_backbone_steps=self.config.train.freeze_backbone_steps,
        )

    def at(self, step: int) -> StepValues:
        """The scheduled values of one step."""
        return self.schedules.at(step)

    def for_workers(self, workers: int) -> Plan:
        """The plan of a group of another size: the same micro batches, dealt to other hands.

        A step has the same micro batches whatever the size, so what is computed over a micro batch
        (KoLeo, iBOT's centre) does not change with it.
        """
        accumulation = self.workers * self.accumulation // workers
        return self.model_copy(
            update={
                "workers": workers,
                "accumulation": accumulation,
                "worker_batch": self.micro_batch * accumulation,
            }
        )

    @property
    def learns_features(self) -> bool:
        """Whether the student learns the features of a frozen teacher."""
        return self.distil_loss in ("cosine", "smooth_l1")

    @property
    def headless(self) -> bool:
        """Whether it learns these alone: no heads, no local crops."""
        return self.learns_features and not self.config.distill.objective

    @property
    def local_crops(self) -> int:
        """Local crops of an image that are cut."""
        return 0 if self.headless else self.config.augment.local_crops

    @property
    def share(self) -> Share:
        """What a training worker reserves."""
        return Share(self.cpus_per_worker, self.gpus_per_worker)

    def arranged_on(self, nodes: Sequence[Node], most: int | None = None) -> Arrangement | None:
        """The largest group that these nodes have room for, and the decoders beside it.

        Args:
            nodes: what each node has, all of it.
            most: workers at most.
        """
        sizes = [n for n in self.sizes if most is None or n <= most]
        return arrange_largest(self.config, nodes, sizes, self.share, self.feeder_cpus)

    def no_room_on(self, nodes: Sequence[Node]) -> PlacementError:
        """What these nodes lack for the smallest group."""
        machine = Machine(
            cpus=int(sum(n.cpus for n in nodes)),
            gpus=int(sum(n.gpus for n in nodes)),
            bfloat16=False,
            nodes=tuple(nodes),
        )
        return no_room(self.config, machine, self.sizes[0], self.share, self.feeder_cpus)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a global crop, height and width."""
        side = self.config.augment.global_size // self.config.model.patch_size
        return side, side

    @property
    def view_bytes(self) -> int:
        """Bytes of the uint8 crops of one image."""
        return view_bytes(self.config, self.local_crops)

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation follows a step: step 0, every n steps, the last one."""
        return step % self.eval_every == 0 or step == self.steps

    @property
    def evaluation_size(self) -> int:
        """Side of an evaluation image, pixels."""
        return evaluation_size(self.config)


@dataclass(frozen=True)
class SetFacts:
    """What a plan needs to know of the set of images.

    Attributes:
        images: that it has.
        digest: of all of them.
        class_names: by class id; none where the set has no names.
        image_bytes: mean size of an encoded image; large ones make the shuffle window shorter.
        layout: of the set's row groups, see `stream.order.layout_of`.
        value_range: that the images are decoded with, see `shards.set_range`.
    """

    images: int
    digest: str
    class_names: tuple[str, ...] = ()
    image_bytes: float = 0.0
    layout: str = ""
    value_range: Literal["full"] | tuple[float, float] | None = None


def resolve(config: Config, data: SetFacts, machine: Machine) -> Plan:
    """Turns passes into steps, scales the lr, picks workers, batch and precision.

    Raises:
        ConfigError: where the numbers cannot work together, with all that is wrong.
    """
    optim, train = config.optim, config.train
    problems: list[str] = []
    batch = optim.global_batch_size
    gpus = 0 if train.device == "cpu" else machine.gpus
    per_worker = worker_share(config, gpus)
    feeder_cpus = feeder_share(config, machine)
    sizes = group_sizes(config, machine, gpus)
    if not sizes:
        problems.append(
            f"optim.global_batch_size={batch} does not divide into train.workers="
            f"{shown(train.workers)} x train.accumulation={train.accumulation}"
        )
    parts = (sizes[-1] if sizes else 1) * train.accumulation
    share = max(1, batch // parts)
    if data.images < batch:
        problems.append(
            f"optim.global_batch_size={batch} is more than the {data.images} images of the set; "
            "a pass needs at least one step"
        )
    steps_per_pass = max(1, data.images // batch)
    if optim.steps is None and optim.passes is None:
        problems.append("optim.passes or optim.steps must say how long the run is")
    steps = optim.steps or max(1, round((optim.passes or 1) * steps_per_pass))
    if train.freeze_backbone_steps >= steps:
        problems.append(
            f"train.freeze_backbone_steps={train.freeze_backbone_steps} freezes the backbone in "
            f"all {steps} steps"
        )
    if train.profile_steps and train.profile_steps[1] > steps:
        problems.append(
            f"train.profile_steps={shown(train.profile_steps)} ends after the last step, {steps}"
        )
    masked = int(2 * batch * config.loss.mask_probability)
    if config.loss.ibot_weight and not config.distill.alone and not masked:
        problems.append(
            f"loss.mask_probability={config.loss.mask_probability} of the {2 * batch} global crops "
            "of a step are none: iBOT would have nothing to predict"
        )
    if train.strategy == "fsdp" and gpus and config.resources.gpus_per_worker < 1:
        problems.append(
            "train.strategy=fsdp needs a whole GPU for each worker, and resources.gpus_per_worker="
            f"{config.resources.gpus_per_worker}"
        )
    if train.residual == "bfloat16" and config.model.encoder != "dinov2":
        problems.append(
            f"train.residual=bfloat16 is for model.encoder=dinov2, not {config.model.encoder}"
        )
    if train.loss_kernels == "triton" and not gpus and train.device != "cuda":
        problems.append(
            "train.loss_kernels=triton needs GPUs, and this run is on CPUs; auto takes Triton "
            "where there are GPUs"
        )
    if problems:
        raise ConfigError("\n".join(problems), "change them in the recipe or as a.b=value")
    arrangement = arrange_largest(config, machine.rooms, sizes, per_worker, feeder_cpus)
    if arrangement is None or (train.device == "cuda" and not gpus):
        raise no_room(config, machine, sizes[0], per_worker, feeder_cpus)
    device: Literal["cpu", "cuda"] = "cuda" if gpus else "cpu"
    precision, reason = _precision(config, machine, device)
    window = window_of(config.data.shuffle_images, batch, data.image_bytes)
    chunk = chunk_of(
        math.gcd(share, window), view_bytes(config, config.augment.local_crops), data.image_bytes
    )
    accumulation = parts // arrangement.workers
    scale = math.sqrt(batch / 1024) if optim.lr_scaling == "sqrt_1024" else 1.0
    return Plan(
        config=config,
        images=data.images,
        digest=data.digest,
        layout=data.layout,
        value_range=data.value_range,
        class_names=data.class_names,
        device=device,
        workers=arrangement.workers,
        sizes=sizes,
        steps=steps,
        steps_per_pass=steps_per_pass,
        dropped_per_pass=data.images - steps_per_pass * batch,
        worker_batch=share * accumulation,
        micro_batch=share,
        accumulation=accumulation,
        chunk_images=chunk,
        window_images=window,
        lr=optim.lr * scale,
        warmup_steps=round(optim.warmup * steps),
        freeze_last_layer_steps=round(optim.freeze_last_layer * steps),
        temperature_warmup_steps=round(config.teacher.temperature_warmup * steps),
        precision=precision,
        precision_reason=reason,
        compile=device == "cuda" if train.compile == "auto" else train.compile,
        eval_every=train.eval_every or max(1, math.ceil(steps / 10)),
        save_every=train.save_every or max(1, math.ceil(steps / 20)),
        cpus_per_worker=per_worker.cpus,
        gpus_per_worker=per_worker.gpus,
        feeder_cpus=arrangement.feeder_cpus,
        decode_cpus=arrangement.decode_cpus,
        decode_tasks=arrangement.decode_tasks,
        threads=arrangement.threads,
        streams=arrangement.streams,
    )


def evaluation_size(config: Config) -> int:
    """Side of an evaluation image, pixels."""
    return config.evaluate.image_size or config.augment.global_size


def view_bytes(config: Config, local_crops: int) -> int:
    """Bytes of the uint8 crops of one image."""
    augment = config.augment
    pixels = 2 * augment.global_size**2 + local_crops * augment.local_size**2
    return config.model.in_channels * pixels


def _precision(
    config: Config, machine: Machine, device: str
) -> tuple[Literal["float32", "bfloat16"], str]:
    asked = config.train.precision
    if asked != "auto":
        return asked, "asked for"
    if device == "cuda" or machine.bfloat16:
        return "bfloat16", f"the {device} has it"
    return "float32", f"no fast bfloat16 on this {device}"
