"""What the documents compute by hand, each against ten lines that do not use the package."""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import api
from pipeline.errors import PipelineError
from pipeline.views.crops import crop_boxes, uniforms

SIZES: dict[str, Any] = {
    "image_size": 28,
    "patch_size": 14,
    "embed_dim": 48,
    "num_heads": 3,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "in_channels": 4,
    "num_register_tokens": 2,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "head_output_dim": 24,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_pair_from_the_names_of_the_field() -> None:
    pair = api.build_student_teacher(**SIZES)
    student, teacher = pair
    assert student is pair.student and teacher is pair.teacher
    for (name, a), (_, b) in zip(
        student.named_parameters(), teacher.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.requires_grad and not b.requires_grad
    # Counted by hand from the sizes: D width, H hidden, T tokens with CLS and registers.
    d, hidden, patches = 48, 96, 4
    block = 4 * d * d + 4 * d + 2 * d * hidden + hidden + d + 4 * d + 2 * d
    embed = 4 * 14 * 14 * d + d + d * (1 + 2 + 1) + (patches + 1) * d
    backbone = sum(p.numel() for p in student.backbone.parameters())
    assert backbone == embed + 2 * block + 2 * d
    head = d * 32 + 32 + 32 * 32 + 32 + 32 * 16 + 16 + 24 * 16 + 24
    assert sum(p.numel() for p in student.dino_head.parameters()) == head
    encoded = student(draw(3, 4, 28, 28))
    assert encoded.cls.shape == (3, 48) and encoded.dino.shape == (3, 24)


def test_a_name_that_the_field_does_not_have() -> None:
    with pytest.raises(PipelineError, match="no embed_dims\n  did you mean embed_dim"):
        api.build_student_teacher(embed_dims=3)  # type: ignore[call-arg]


def by_hand(s: Tensor, t: Tensor, rate: float, sharp: float, centre: Tensor) -> Tensor:
    q = ((t - centre) / sharp).softmax(-1)
    return -(q * (s / rate).log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize("centred", [False, True])
def test_dino_loss_of_rows(centred: bool) -> None:
    s, t = draw(5, 7).requires_grad_(), draw(5, 7, seed=1).requires_grad_()
    centre = draw(7, seed=2) if centred else None
    loss = api.dino_loss(s, t, student_temperature=0.2, teacher_temperature=0.07, centre=centre)
    expected = by_hand(s, t.detach(), 0.2, 0.07, centre if centred else torch.zeros(7))
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(expected, s)
    loss.backward()
    torch.testing.assert_close(s.grad, grad)
    assert t.grad is None


@pytest.mark.parametrize(("views", "targets"), [(2, 2), (6, 2), (5, 3)])
def test_dino_loss_of_views(views: int, targets: int) -> None:
    s, t, centre = draw(views, 4, 7), draw(targets, 4, 7, seed=1), draw(7, seed=2)
    pairs = [(v, g) for v in range(views) for g in range(targets) if v != g]
    expected = sum(by_hand(s[v], t[g], 0.1, 0.04, centre) for v, g in pairs) / len(pairs)
    torch.testing.assert_close(api.dino_loss(s, t, centre=centre), expected)
    torch.testing.assert_close(api.dino_loss(list(s), list(t), centre=centre), expected)


def test_the_symmetrised_loss_of_two_views() -> None:
    s1, s2, t1, t2 = draw(4, 3, 7)
    zero = torch.zeros(7)
    expected = (by_hand(s1, t2, 0.1, 0.04, zero) + by_hand(s2, t1, 0.1, 0.04, zero)) / 2
    torch.testing.assert_close(api.dino_loss([s1, s2], [t1, t2]), expected)


def test_the_loss_with_a_target_is_the_old_one() -> None:
    t, s = draw(8, 7), draw(16, 7, seed=1)
    (target,) = api.softmax_targets([t], torch.zeros(7), temperature=0.04)
    terms = api.dino_loss(s, target, local_crops=2)
    torch.testing.assert_close(sum(terms), api.dino_loss(s.view(4, 4, 7), t.view(2, 4, 7)))


def test_koleo_of_rows_and_of_tokens() -> None:
    def plain(x: Tensor) -> float:
        x = F.normalize(x.double(), dim=-1)
        total = 0.0
        for i in range(len(x)):
            total += math.log(min(float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i))
        return -total / len(x)

    tokens = draw(3, 6, 5)
    assert float(api.koleo(tokens[0])) == pytest.approx(plain(tokens[0]), rel=1e-5)
    expected = sum(plain(x) for x in tokens) / 3
    assert float(api.koleo(tokens)) == pytest.approx(expected, rel=1e-5)


def test_update_centre() -> None:
    teacher, centre = draw(3, 4, 7), draw(7, seed=1)
    before = centre.clone()
    expected = 0.8 * centre + 0.2 * teacher.reshape(12, 7).mean(0)
    for given in (teacher, list(teacher), teacher.reshape(12, 7)):
        torch.testing.assert_close(api.update_centre(given, centre, momentum=0.8), expected)
    assert torch.equal(centre, before)


def test_logits_without_images_and_wrong_names_are_a_sentence() -> None:
    with pytest.raises(PipelineError, match=r"update_centre got logits \[7\], expected \[B, K\]"):
        api.update_centre(draw(7), draw(7))
    with pytest.raises(PipelineError, match="dino_loss has no teacher_temp\n  there are student"):
        api.dino_loss(draw(4, 7), draw(4, 7), teacher_temp=0.04)  # type: ignore[call-overload]


def test_update_teacher_of_modules_and_of_names() -> None:
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    student(draw(8, 3))
    expected = {
        name: 0.996 * a + 0.004 * b if a.is_floating_point() else b.clone()
        for (name, a), b in zip(
            teacher.state_dict().items(), student.state_dict().values(), strict=True
        )
    }
    names = copy.deepcopy(teacher.state_dict())
    assert api.update_teacher(student.state_dict(), names) is names
    for name, value in expected.items():
        torch.testing.assert_close(names[name], value, msg=name)
    assert api.update_teacher(student, teacher, momentum=0.996) is teacher
    for name, value in teacher.named_parameters():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_update_teacher_refuses_half_precision(student: torch.dtype, teacher: torch.dtype) -> None:
    before = {"w": torch.ones(3, dtype=teacher)}
    with pytest.raises(PipelineError, match=f"w is {teacher} in the teacher and {student}"):
        api.update_teacher({"w": torch.zeros(3, dtype=student)}, before)
    assert before["w"].eq(1).all()


def test_update_teacher_refuses_what_does_not_fit() -> None:
    student = nn.Linear(3, 4)
    for teacher, said in (
        (nn.Linear(3, 5), r"differ in 2 tensors.*weight: \[4, 3\] and \[5, 3\]"),
        (dict(student.state_dict()), "the same tensor in 2 places"),
        ({"weight": {"deep": 1}}, "expected a module or names with tensors"),
    ):
        with pytest.raises(PipelineError, match=said):
            api.update_teacher(student.state_dict(), teacher)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        (draw(4, 7), draw(4, 6), r"student \[4, 7\], teacher \[4, 6\]"),
        (draw(3, 4, 7), draw(1, 4, 7), "2 <= G <= V"),
        (draw(3, 4, 7), draw(4, 7), "expected both"),
        ([draw(4, 7), draw(3, 7)], draw(2, 4, 7), "logits of views"),
    ],
)
def test_dino_loss_refuses_what_does_not_fit(student: Any, teacher: Any, said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        api.dino_loss(student, teacher)


def views_of(pair: api.Pair) -> api.Views:
    return api.Views.of(
        [draw(3, 4, 28, 28, seed=n) for n in range(2)],
        [draw(3, 4, 14, 14, seed=n) for n in range(2, 5)],
    )


def test_forward_gives_loss_cls_and_logits() -> None:
    """Against the networks called one after the other, and the loss by hand."""
    pair = api.build_student_teacher(**SIZES)
    objective = api.Objective.for_pair(api.ObjectiveSpec(ibot_weight=0, koleo_weight=0.5), pair)
    views = views_of(pair)
    out = api.forward(pair, views, objective, teacher_temperature=0.05)
    with torch.no_grad():
        cls = torch.stack([pair.teacher.backbone(x) for x in views.global_views.chunk(2)])
        teacher = pair.teacher.dino_head(cls)
    parts = [*views.global_views.chunk(2), *views.local_views.chunk(3)]
    features = [pair.student.backbone(x) for x in parts]
    student = torch.stack([pair.student.dino_head(x) for x in features])
    torch.testing.assert_close(out.cls, cls)
    torch.testing.assert_close(out.teacher_logits, teacher)
    torch.testing.assert_close(out.student_logits, student)
    pairs = [(v, g) for v in range(5) for g in range(2) if v != g]
    zero = torch.zeros(24)
    dino = sum(by_hand(student[v], teacher[g], 0.1, 0.05, zero) for v, g in pairs) / len(pairs)
    spread = api.koleo(features[0]) + api.koleo(features[1])
    torch.testing.assert_close(out.loss, dino + 0.5 * spread)
    out.loss.backward()
    assert all(p.grad is not None for p in pair.student.dino_head.parameters())
    assert not out.teacher_logits.requires_grad


def test_views_without_masks_train_and_ibot_wants_masks() -> None:
    pair = api.build_student_teacher(**SIZES)
    views = views_of(pair)
    optimizer = torch.optim.AdamW(api.parameter_groups(pair.student))
    values = api.StepValues(1e-3, 0.04, 0.99, 0.05, 1e-3)
    objective = api.Objective.for_pair(api.ObjectiveSpec(ibot_weight=0), pair)
    result = api.train_step(pair.student, pair, [views], optimizer, values, objective)
    assert torch.isfinite(result.scalars["loss/total"])
    with pytest.raises(PipelineError, match="no masks, and iBOT has weight"):
        api.forward(pair, views, api.Objective.for_pair(api.ObjectiveSpec(), pair))


def test_a_module_tells_its_width_itself() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1))
    module = nn.Sequential(net, nn.Flatten())
    before = copy.deepcopy(module.state_dict())
    pair = api.student_teacher(module, api.HeadSpec(8, 4, 8))
    assert pair.student.backbone.width == 6 and module.training
    for name, value in module.state_dict().items():  # the trial leaves no trace in BatchNorm
        assert torch.equal(value, before[name]), name


@pytest.mark.long
def test_a_timm_model_by_its_name(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
    torch.manual_seed(5)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    local = {"file": str(tmp_path / "weights.pt")}
    pair = api.student_teacher(
        "vit_tiny_patch16_224",
        api.HeadSpec(8, 4, 8),
        encoder_kwargs=kwargs | {"pretrained_cfg_overlay": local},
        pretrained=True,
    )
    backbone: Any = pair.teacher.backbone
    assert (backbone.width, backbone.patch_size, backbone.has_patches) == (24, 8, True)
    x = draw(2, 3, 32, 32)
    torch.testing.assert_close(backbone(x), theirs(x))
    assert pair.student(draw(2, 3, 16, 16)).cls.shape == (2, 24)  # local crops
    assert api.student_teacher("resnet10t", api.HeadSpec(8, 4, 8)).student.backbone.width == 512


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"backbone": "vit_tiny_patch16_225"}, "no model 'vit_tiny_patch16_225'\n  did you mean"),
        ({"backbone": "resnet10t", "encoder_kwargs": {"depht": 2}}, "depht"),
        ({"backbone": "vits14", "pretrained": True}, "vits14 is none"),
    ],
)
def test_wrong_names_of_models(call: dict[str, Any], said: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(PipelineError, match=said):
        api.student_teacher(**call)


def photographs(folder: Path) -> list[Path]:
    paths = []
    for n, kind in enumerate(("png", "jpg", "png")):
        pixels = np.random.default_rng(n).integers(0, 256, (40 + n, 64, 3), np.uint8)
        paths.append(folder / f"{n}.{kind}")
        Image.fromarray(pixels).resize((80, 60)).save(paths[-1])
    return paths


CROPS = api.CropSpec(global_size=28, local_size=14, local_crops=3)


def test_multi_crop_takes_files_pictures_and_tensors(tmp_path: Path) -> None:
    paths = photographs(tmp_path)
    views = api.multi_crop(paths, CROPS, patch_size=14)
    assert views.global_views.shape == (6, 3, 28, 28) and views.local_views.shape == (9, 3, 14, 14)
    assert views.masks.shape == (6, 4) and views.images == 3
    pictures = [Image.open(path) for path in paths]
    pixels = [torch.from_numpy(np.array(x)) for x in pictures]
    # Boxes are drawn by the bytes; without chance all three kinds are the same pixels.
    whole = api.CropSpec(28, 14, 0, (1.0, 1.0), ratio=(4 / 3, 4 / 3), flip_probability=0.0)
    plain = api.PhotometricSpec(
        jitter_probability=0, greyscale_probability=0, blur_probability=(0, 0, 0),
        solarize_probability=(0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1),
    )  # fmt: skip
    first = api.multi_crop(paths, whole, plain)
    for given in (pictures, pixels, [x.permute(2, 0, 1) for x in pixels]):
        assert torch.equal(api.multi_crop(given, whole, plain).global_views, first.global_views)
    assert first.masks.shape == (6, 0)
    resized = F.interpolate(
        pixels[0].permute(2, 0, 1)[None].float(), (28, 28), mode="bicubic", antialias=True
    )
    assert (resized[0].clamp(0, 255) / 255 - first.global_views[0]).abs().max() < 1.01 / 255
    assert not torch.equal(
        api.multi_crop(paths, CROPS, pass_index=1).global_views,
        api.multi_crop(paths, CROPS).global_views,
    )


def test_a_files_crops_are_those_of_a_run_with_this_seed(tmp_path: Path) -> None:
    """A run keys its draws by seed, pass and the hash of the file's bytes, and nothing else."""
    path = photographs(tmp_path)[0]
    plain = api.PhotometricSpec(0, 0, 0, 0, 0, 0, (0, 0, 0), solarize_probability=(0, 0, 0),
                                mean=(0, 0, 0), std=(1, 1, 1))  # fmt: skip
    views = api.multi_crop(path, CROPS, plain, seed=7, pass_index=3)
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    u = uniforms(7, 3, np.frombuffer(digest, np.uint8)[None], CROPS.draws)
    boxes, flips = crop_boxes(u, [80], [60], CROPS)
    image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float()
    for n, view in enumerate([*views.global_views, *views.local_views]):
        top, left, height, width = boxes[0, n].tolist()
        cut, side = image[..., top : top + height, left : left + width], view.shape[-1]
        resized = F.interpolate(cut, (side, side), mode="bicubic", antialias=True)[0]
        expected = (resized.flip(2) if flips[0, n] else resized).round().clamp(0, 255) / 255
        assert (view - expected).abs().max() < 6 / 255, n  # the kernel rounds twice


def test_views_that_do_not_fit_are_refused() -> None:
    whole, small = draw(2, 3, 28, 28), draw(2, 3, 14, 14)
    for views, said in (
        (([whole], []), "two or more global views"),
        (([whole, small], []), "expected lists of"),
        (([whole, whole], [small[:1]]), "are not those of 2 images"),
    ):
        with pytest.raises(PipelineError, match=said):
            api.Views.of(*views)


def test_plain_images_are_embedded_as_the_evaluation_does(tmp_path: Path) -> None:
    paths = photographs(tmp_path)
    pair = api.build_student_teacher(**(SIZES | {"in_channels": 3}))
    x = []
    for path in paths:
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
        side = 28 + 2 * round(28 / 14)
        resized = F.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
        crop = resized.round().clamp(0, 255)[0, :, 2:-2, 2:-2] / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x.append((crop - mean[:, None, None]) / std[:, None, None])
    prepared = api.prepare(paths, 28)
    assert (prepared - torch.stack(x)).abs().max() < 2.01 / 255 / 0.224  # the kernel's rounding
    features = api.embed(pair, paths, 28)
    with torch.no_grad():
        expected = pair.teacher.backbone(prepared)
    torch.testing.assert_close(features, expected)
    assert torch.equal(features, api.embed(pair.teacher.backbone, paths, 28))
    alone = api.embed(pair.teacher, paths[0], 28)  # another batch size adds in another order
    torch.testing.assert_close(features[:1], alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(features, api.embed(pair, paths))  # 28 is what it was built for
    assert pair.student.training


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    for images, said in (
        ([tmp_path / "nothing.png"], "no image at"),
        ([*photographs(tmp_path), tmp_path / "broken.png"], "image 3 is "),
        (torch.rand(2, 3, 8, 8), r"torch\.float32|float32 \[3, 8, 8\]"),
        ([], "no images"),
        ([7], "an image is int"),
    ):
        for call in (api.multi_crop, api.prepare):
            with pytest.raises(PipelineError, match=said):
                call(images)
