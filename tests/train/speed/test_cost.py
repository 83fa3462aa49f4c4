"""The estimate of a run's memory against real steps and real files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pipeline.config.load import load
from pipeline.model import block
from pipeline.model.groups import parameter_groups
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.train import build, estimate
from pipeline.train.checkpoint import state
from pipeline.train.checkpoint.names import optimizer_state
from pipeline.train.parallel import strategy as parallel
from pipeline.train.speed import cost
from pipeline.train.step import train_step
from pipeline.views.batch import Views

IMAGES = 4
SMALL = [
    "augment.global_size=48",
    "augment.local_size=24",
    "augment.local_crops=4",
    "model.patch_size=6",
    "model.width=128",
    "model.depth=4",
    "model.heads=4",
    "model.registers=1",
    "model.drop_path=0",
    "head.prototypes=512",
    "head.bottleneck=64",
    "head.hidden=256",
    "optim.steps=10",
    f"optim.global_batch_size={IMAGES}",
    "train.workers=1",
    "train.precision=float32",
]
TIMM = ["model.encoder=timm:convnext_atto", "loss.ibot_weight=0", "loss.mask_probability=0"]
TIMM += ["model.patch_size=16", "augment.global_size=64", "augment.local_size=32"]


def plan(*overrides: str) -> Plan:
    machine = Machine(cpus=2, gpus=0, bfloat16=False)
    config = load([*SMALL, *overrides])
    return resolve(config, SetFacts(100, "d"), machine=machine)


def views(of: Plan) -> Views:
    """Noise, with as many masked patches as the recipe masks on average."""
    augment = of.config.augment
    patches = of.grid[0] * of.grid[1]
    low, high = of.config.loss.mask_ratio
    masked = round(patches * of.config.loss.mask_probability * (low + high) / 2)
    masks = torch.zeros(2 * IMAGES, patches, dtype=torch.bool)
    masks[:, :masked] = True
    return Views(
        torch.randn(2 * IMAGES, 3, augment.global_size, augment.global_size),
        torch.randn(augment.local_crops * IMAGES, 3, augment.local_size, augment.local_size),
        masks,
    )


def test_the_published_backbone() -> None:
    """ViT-S/14 of DINOv2: its parameters by the published shapes."""
    golden = Path(__file__).parents[2] / "golden" / "state_dict_shapes_vits14_518.json"
    shapes = json.loads(golden.read_text())
    shapes = shapes.get("shapes", shapes)
    published = sum(math.prod(shape) for shape in shapes.values())
    config = load(["augment.global_size=518", "model.registers=0"])
    large = build.backbone_spec(config).build()
    assert sum(p.numel() for p in large.parameters()) == published


def test_a_checkpoint_has_the_size_that_was_foretold(tmp_path: Path) -> None:
    planned = plan()
    pair = build.pair(planned.config)
    estimated = estimate.estimated_cost(planned, pair)
    optimizer = torch.optim.AdamW(parameter_groups(pair.student))
    objective = build.objective(planned.config, pair)
    train_step(pair.student, pair, [views(planned)], optimizer, planned.at(0), objective)
    tensors = {
        "student": pair.student.state_dict(),
        "teacher": pair.teacher.state_dict(),
        "objective": objective.state_dict(),
        "optimizer": optimizer_state(optimizer),
    }
    saved = state.save(tmp_path, 1, tensors, {})
    assert saved.meta["bytes"] == pytest.approx(estimated.checkpoint_bytes, rel=0.1)
    # in memory: the checkpoint's four and the gradients
    gradients = sum(p.grad.nbytes for p in pair.student.parameters() if p.grad is not None)
    memory = estimated.memory
    named = memory.weights + memory.gradients + memory.moments + memory.teacher
    assert named == pytest.approx(estimated.checkpoint_bytes + gradients, rel=0.01)


def test_a_micro_batch_scales_activations_but_not_the_state() -> None:
    small, large = (
        estimate.estimated_cost(planned, build.pair(planned.config))
        for planned in (plan(), plan("optim.global_batch_size=8"))
    )
    assert large.memory.state == small.memory.state
    few, many = small.memory.parts(), large.memory.parts()
    assert few.keys() == many.keys()
    grow = {"activations", "logits and targets", "views", "work space"}
    for name in few:
        expected = (2 if name in grow else 1) * few[name]
        # places of masked patches are filled up to a multiple of 32
        assert many[name] == pytest.approx(expected, rel=0.2 if "logits" in name else 0.05), name
    assert few["libraries"] == cost.LIBRARIES
    assert large.memory_bytes == sum(many.values())  # nothing has no name
    assert small.memory.of(8, 1).parts() == pytest.approx(many, rel=0.2)
    # but for KoLeo, which compares all images of a micro batch
    assert large.flops_per_image == pytest.approx(small.flops_per_image, rel=1e-3)


def test_every_part_is_named_in_the_line() -> None:
    planned = plan("train.precision=bfloat16", "loss.centring=sinkhorn").model_copy(
        update={"device": "cuda", "gpus_per_worker": 1.0, "workers": 2, "accumulation": 3}
    )
    memory = estimate.estimated_cost(planned, build.pair(planned.config)).memory
    line = memory.line()
    assert all(name in line for name in memory.parts())
    assert "CUDA and NCCL" in line and memory.total == memory.allocated + memory.context
    once = replace(memory, targets_at_once=False)
    held = 2 * IMAGES * memory.targets  # two more micro batches of the teacher's logits
    assert memory.allocated - once.allocated == pytest.approx(held)
    assert memory.parts()["views"] == IMAGES * 3 * memory.views * 2  # and those of the next step


GPU = [["model.drop_path=0.4"], ["model.ffn=swiglu"], ["train.residual=bfloat16"]]
GPU += [["train.activation_checkpointing=true", "model.depth=8"]]


@pytest.mark.parametrize("overrides", GPU, ids=lambda overrides: overrides[0])
def test_what_a_gpu_keeps_is_what_the_networks_keep(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without contents, with the attention of a GPU; the networks as they are."""
    monkeypatch.setattr(block, "_attend", F.scaled_dot_product_attention)
    planned = plan(
        "train.precision=bfloat16", "model.width=384", "model.heads=6", "head.prototypes=64",
        "head.hidden=8", "optim.global_batch_size=32", *overrides,
    ).model_copy(update={"device": "cuda"})  # fmt: skip
    pair = build.pair(planned.config)
    layout = build.layout(planned, torch.device("cpu"))
    parallel.prepare(pair, replace(layout, checkpointing=False, compile=False))
    estimated = estimate.estimated_cost(planned, pair).memory.activations
    kept, _ = estimate._kept(planned, pair)
    if layout.checkpointing:  # of eight blocks one, and the input of each
        width, tokens = 384, estimate.tokens_per_image(planned, pair)
        kept = kept / 8 + 8 * width * tokens * 4
    # eager attention keeps its output in two orders, and selections their places
    assert 0.85 * kept < estimated < 1.02 * kept


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "overrides",
    [[], ["model.ffn=swiglu", "model.drop_path=0.3"], ["head.prototypes=4096"], TIMM],
    ids=["vit", "swiglu", "prototypes", "timm"],
)
def test_what_a_real_step_keeps_for_backward(overrides: list[str], precision: str) -> None:
    """Against the bytes of the tensors that a step with contents hands to autograd."""
    planned = plan(*overrides, f"train.precision={precision}")
    half = precision == "bfloat16"
    pair = build.pair(planned.config)
    objective = build.objective(planned.config, pair)
    optimizer = torch.optim.AdamW(parameter_groups(pair.student))
    weights = {p.untyped_storage().data_ptr() for p in pair.student.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in weights:
            kept[at] = tensor
        return tensor

    dtype = torch.bfloat16 if half else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train_step(
            pair.student, pair, [views(planned)], optimizer, planned.at(0), objective,
            autocast_dtype=dtype, generator=torch.Generator(),
        )  # fmt: skip
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimated = estimate.estimated_cost(planned, pair)
    parts = estimated.memory.parts()
    assert parts["activations"] + estimated.memory.copies == pytest.approx(measured, rel=0.1)
    # of student and teacher: CLS tokens, and as many patches as places are filled up to
    rows = IMAGES * (4 + planned.config.augment.local_crops)
    rows += 2 * build.patch_finder(planned).length
    logits = (2 if half else 4) * rows * planned.config.head.prototypes
    assert parts["logits and targets"] == pytest.approx(logits)
    assert all(
        p.device.type == "cpu" and p.dtype == torch.float32 for p in pair.student.parameters()
    )
