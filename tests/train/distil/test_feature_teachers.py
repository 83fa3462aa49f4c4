"""Every kind of model as a frozen teacher, through the plan of a run: against the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.adapt.facts import facts_of
from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.embed.teacher import TeacherSource, teacher_of
from pipeline.errors import PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.encoders.frozen import FeatureTeacher
from pipeline.model.pair import Pair
from pipeline.model.vit import BackboneSpec, VisionTransformer
from pipeline.model.weights import save_backbone, save_huggingface, save_timm
from pipeline.plan.plan import Plan
from pipeline.train import build, estimate, start
from pipeline.train.checkpoint import state
from pipeline.train.distil.lines import objective_line, teacher_lines
from pipeline.train.parallel.strategy import Layout
from tests.train.test_start import config, planned, run_folder

SPEC = BackboneSpec(image_size=35, patch_size=7, width=36, depth=2, heads=3, registers=2)
MEAN, STD = (0.45, 0.5, 0.5), (0.3, 0.2, 0.25)
OURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of the student's views


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    torch.manual_seed(3)
    return SPEC.build().eval()


def sources(plan: Plan) -> TeacherSource | None:
    """As `stages.pretrain.teacher_source`."""
    if not plan.learns_features:
        return None
    size = plan.config.distill.image_size
    return teacher_of(plan.frozen_teacher, size, digest=plan.teacher_digest)


def built(plan: Plan) -> Pair:
    return start.networks(plan, resumed=False, source=sources(plan))


def values(seed: int = 0, images: int = 3) -> Tensor:
    """Pixels 0 to 1."""
    return torch.rand(images, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def normalised(x: Tensor, mean: Any, std: Any) -> Tensor:
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def expected(backbone: VisionTransformer, size: int) -> tuple[Tensor, Tensor]:
    """Features of these pixels, as the network's own images are made of them."""
    pixels = torch.nn.functional.interpolate(
        values(), (size, size), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        out = backbone.forward_features(normalised(pixels, MEAN, STD))
    cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"]
    assert cls is not None and patches is not None
    return cls, patches


def answers(teacher: FeatureTeacher, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    features = teacher(normalised(values(), *OURS), grid)
    assert features.patches is not None
    return features.cls, features.patches.view(3, -1, 36)


@pytest.mark.parametrize("kind", ["dinov2", "huggingface", "timm", "run"])
def test_a_teacher_says_what_its_network_says(
    backbone: VisionTransformer, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / kind
    if kind == "dinov2":
        save_backbone(backbone, SPEC, folder)
    elif kind == "huggingface":
        save_huggingface(backbone, SPEC, folder, Preprocessing(35, MEAN, STD))
    elif kind == "timm":
        save_timm(backbone, SPEC, folder, Preprocessing(35, MEAN, STD))
    else:
        backbone = of_a_run(folder)
    loss = [f"distill.teacher={folder}", "distill.loss=cosine"]
    plan = planned(*loss)
    teacher = built(plan).feature_teacher
    assert teacher is not None and (teacher.width, teacher.patch_width) == (36, 36)
    mean, std = OURS if kind == "dinov2" else (MEAN, STD)  # nothing stands beside its weights
    pixels = torch.nn.functional.interpolate(
        values(), (teacher.size, teacher.size), mode="bilinear", antialias=True
    )
    with torch.no_grad():
        out = backbone.forward_features(normalised(pixels, mean, std))
    cls, patches = answers(teacher, teacher.grid)
    torch.testing.assert_close(cls, out["x_norm_clstoken"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(patches, out["x_norm_patchtokens"], rtol=1e-4, atol=1e-4)


def of_a_run(folder: Path) -> VisionTransformer:
    """A run folder of another width, and the backbone of its teacher."""
    run_folder(
        folder,
        *("model.width=36", "model.heads=3", "augment.global_size=35", "model.patch_size=7"),
        *("augment.local_size=14", f"augment.mean={list(MEAN)}", f"augment.std={list(STD)}"),
    )
    saved = state.latest(folder / "checkpoints")
    assert saved is not None
    network = start.encoder_of(saved)[0].backbone.eval()
    assert isinstance(network, VisionTransformer)
    return network


def test_onnx(backbone: VisionTransformer, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from pipeline.model.onnx_out import save_onnx

    whole, *_ = save_onnx(backbone, tmp_path, [35], Preprocessing(None, MEAN, STD, "full"))
    plan = planned(f"distill.teacher={whole.path}")
    assert plan.distil_loss == "cosine" and "without heads" in plan.distil_reason
    pair = built(plan)
    teacher = pair.feature_teacher
    assert teacher is not None and teacher.outside and teacher.size == 35
    assert teacher.weight_bytes >= 4 * sum(p.numel() for p in backbone.parameters())
    cls, patches = answers(teacher, (5, 5))
    theirs = expected(backbone, 35)
    torch.testing.assert_close(cls, theirs[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(patches, theirs[1], rtol=1e-3, atol=1e-2)
    lines = "\n".join(teacher_lines(plan, pair))
    assert "MiB of ONNX" in lines and "ms an image here" in lines
    assert estimate.flops_per_image(plan, pair) > 0
    step_of(pair, plan)


def test_a_timm_model(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from pipeline.model.foreign import TimmSpec
    from pipeline.model.foreign_weights import save_foreign

    torch.manual_seed(0)
    network = TimmSpec("convnext_atto", 32, 16).build().eval()
    save_foreign(network, tmp_path / "timm", Preprocessing(None, MEAN, STD))
    plan = planned(f"distill.teacher=timm:local-dir:{tmp_path / 'timm'}")
    pair = built(plan)
    teacher = pair.feature_teacher
    assert teacher is not None and teacher.patch_width == 0 and teacher.size == 32
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    pixels = torch.nn.functional.interpolate(values(), (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        out = theirs(normalised(pixels, MEAN, STD))
    torch.testing.assert_close(
        teacher(normalised(values(), *OURS), None).cls, out, rtol=1e-4, atol=1e-4
    )
    assert "no patches: the teacher has none" in "\n".join(teacher_lines(plan, pair))
    step_of(pair, plan)


def step_of(pair: Pair, plan: Plan) -> None:
    """One step of a pair that a plan made."""
    from pipeline.train.step import train_step
    from tests.train.small_run import VALUES, views

    made = start.train_state(plan, pair, Layout(1, torch.device("cpu")), resumed=False)
    result = train_step(pair.student, pair, [views(3)], made.optimizer, VALUES, made.objective)
    assert torch.isfinite(result.scalars["loss/distil_cls"])


def test_auto_means_targets_where_the_heads_fit(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "large", "model.width=48")
    for override, loss, reason in (
        ([], "targets", ""),
        (["head.prototypes=30"], "cosine", "its head has 20 prototypes, the student's 30"),
        (["model.patch_size=7"], "cosine", "its patches have 14 pixels, the student's 7"),
        (["augment.mean=[0.5,0.5,0.5]"], "cosine", "trained with other augment.mean"),
        (["distill.objective=true", "loss.mask_probability=0.5"], "cosine", "our own objective"),
        (["distill.loss=smooth_l1"], "smooth_l1", ""),
    ):
        plan = planned(f"distill.teacher={folder}", *override)
        assert plan.distil_loss == loss and reason in plan.distil_reason
        pair = built(plan)
        assert (pair.frozen is None) is plan.learns_features
        assert (pair.student.dino_head is None) is plan.headless
        line = objective_line(plan)
        assert ("no heads are built" in line) is plan.headless
        assert plan.local_crops == (0 if plan.headless else 2)
    with pytest.raises(PipelineError, match=r"auto means targets here.*distill\.image_size would"):
        planned(f"distill.teacher={folder}", "distill.image_size=28")


def test_no_waste_without_heads(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "large", "model.width=48")
    asked = [f"distill.teacher={folder}", "distill.loss=cosine"]
    alone = planned(*asked)
    beside = planned(*asked, "distill.objective=true", "loss.mask_probability=0.5")
    costs = [estimate.estimated_cost(plan, built(plan)) for plan in (alone, beside)]
    assert costs[0].flops_per_image < costs[1].flops_per_image
    assert costs[0].parameters < costs[1].parameters
    assert costs[0].memory.logits > 0 and costs[0].memory.targets > 0
    assert build.crop_spec(alone).local_crops == 0 and build.crop_spec(beside).local_crops == 2
    assert build.patch_finder(alone).length == 0 < build.patch_finder(beside).length
    teacher = built(alone).feature_teacher
    assert teacher is not None and costs[0].memory.teacher >= teacher.weight_bytes


def test_a_run_without_heads_is_a_teacher_and_a_start(tmp_path: Path) -> None:
    """Its checkpoint holds an adapter and no heads."""
    first = run_folder(tmp_path / "first", "model.width=48")
    plan = planned(f"distill.teacher={first}", "distill.loss=cosine", "run.seed=5")
    made = start.train_state(plan, built(plan), Layout(1, torch.device("cpu")), resumed=False)
    assert "features" in made.objective.state_dict()
    tensors = made.state()
    meta = {"plan": plan.model_dump(mode="json")}
    state.save(tmp_path / "second" / "checkpoints", 3, tensors, meta)
    encoder, _ = start.encoder_of(state.latest(tmp_path / "second" / "checkpoints"))  # type: ignore[arg-type]
    assert encoder.dino_head is None and encoder.adapter is None
    for name, x in made.pair.teacher.backbone.state_dict().items():
        assert torch.equal(x, encoder.backbone.state_dict()[name])
    third = planned(f"distill.teacher={tmp_path / 'second'}")
    assert third.distil_loss == "cosine" and third.distil_reason == "it was trained without heads"
    pair, text = start.starting_pair(planned(f"model.init={tmp_path / 'second'}"))
    assert "without heads" in text and pair.student.dino_head is not None
    facts = facts_of(load([f"model.init={tmp_path / 'second'}", "adapt.enabled=true"]))
    assert not facts.has_heads and "head.prototypes" not in facts.values  # fresh ones are derived
    again = start.train_state(plan, built(plan), Layout(1, torch.device("cpu")), resumed=True)
    again.restore(state.latest(tmp_path / "second" / "checkpoints").load())  # type: ignore[union-attr]
    for name, x in made.pair.student.state_dict().items():
        assert torch.equal(x, again.pair.student.state_dict()[name])


def test_a_run_that_goes_on_keeps_its_teacher(tmp_path: Path, backbone: VisionTransformer) -> None:
    save_backbone(backbone, SPEC, tmp_path / "weights")
    asked = [f"distill.teacher={tmp_path / 'weights'}", "distill.loss=cosine"]
    plan = planned(*asked)
    source = sources(plan)
    assert source is not None
    plan = plan.model_copy(update={"teacher_digest": source.digest})
    own = state.save(tmp_path / "own", 3, {}, {"plan": plan.model_dump(mode="json")})
    assert start.located(planned(*asked), own) == plan
    torch.manual_seed(9)
    save_backbone(SPEC.build(), SPEC, tmp_path / "weights")
    with pytest.raises(PipelineError, match="has other weights than when the run began"):
        sources(plan)
    with pytest.raises(PipelineError, match="has other weights here than when the run began"):
        source.open(*OURS, "cpu", 1)


def test_what_does_not_fit_is_refused(tmp_path: Path, backbone: VisionTransformer) -> None:
    save_backbone(backbone, SPEC, tmp_path / "weights")
    weights = f"distill.teacher={tmp_path / 'weights'}"
    with pytest.raises(PipelineError, match=r"distill\.teacher=descriptor"):
        built(planned("distill.teacher=descriptor"))
    with pytest.raises(PipelineError, match="there is no"):
        built(planned(f"distill.teacher={tmp_path / 'nothing'}"))
    grey = ["model.in_channels=1", "augment.mean=[0.5]", "augment.std=[0.25]"]
    with pytest.raises(PipelineError, match="images of 3 channels, the student's have 1"):
        built(planned(weights, *grey))
    with pytest.raises(PipelineError, match="takes no images of 36 x 36"):
        built(planned(weights, "distill.image_size=36"))
    deep = run_folder(tmp_path / "run")
    plan = planned(f"distill.teacher={deep}", "distill.loss=cosine")
    plan = plan.model_copy(update={"value_range": (0.0, 4095.0)})
    with pytest.raises(PipelineError, match=r"data\.range=full, the student's images"):
        built(plan)
    # released weights know of 8 bits alone: what deep images become is the student's business
    plan = planned(weights).model_copy(update={"value_range": (0.0, 4095.0)})
    assert built(plan).feature_teacher is not None


def test_an_image_size_of_ones_own(backbone: VisionTransformer, tmp_path: Path) -> None:
    save_huggingface(backbone, SPEC, tmp_path / "hf", Preprocessing(35, MEAN, STD))
    plan = planned(f"distill.teacher={tmp_path / 'hf'}", "distill.image_size=14")
    teacher = built(plan).feature_teacher
    assert teacher is not None and (teacher.size, teacher.grid) == (14, (2, 2))
    assert "resized from 28 to 14 pixels" in "\n".join(teacher_lines(plan, built(plan)))


def test_a_recipe_hides_nothing_unless_our_objective_stands_beside_it() -> None:
    alone = config("distill.teacher=x")
    assert (alone.loss.mask_probability, alone.model.drop_path) == (0, 0)
    beside: Config = config("distill.teacher=x", "distill.objective=true")
    assert (beside.loss.mask_probability, beside.model.drop_path) == (0.5, 0.1)


def test_values_of_onnx(backbone: VisionTransformer, tmp_path: Path) -> None:
    """uint8 and floats 0 to 1 are the same images."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from pipeline.embed.onnx.embedder import OnnxModel
    from pipeline.model.onnx_out import save_onnx

    whole, *_ = save_onnx(backbone, tmp_path, [35], Preprocessing(None, MEAN, STD, "full"))
    model = OnnxModel(str(whole.path), None, MEAN, STD)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 35, 35, 3), np.uint8)
    as_floats = model.of_values(pixels.astype(np.float32) / 255)
    for name, x in model.outputs(pixels).items():
        np.testing.assert_allclose(as_floats[name], x, atol=1e-5)
