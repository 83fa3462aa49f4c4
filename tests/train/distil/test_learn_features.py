"""Steps that learn a teacher's features: against plain loops, and in parts."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.model.encoders.frozen import FeatureTeacher, resampled
from pipeline.model.encoders.module import ModuleBackbone, ModuleSpec
from pipeline.model.encoders.source import Name, read_source
from pipeline.model.groups import parameter_groups
from pipeline.model.pair import Backbone, Pair, build_pair, pair_of
from pipeline.model.vit import BackboneSpec
from pipeline.train.distil.features import FeatureSpec, attach
from pipeline.train.objective import Objective
from pipeline.train.step import ObjectiveSpec, StepResult, forward, train_step
from pipeline.views.batch import Views
from tests.train.small_run import HEAD, SPEC, VALUES, assert_same, split, views

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
OTHER_MEAN, OTHER_STD = (0.45, 0.5, 0.5), (0.3, 0.2, 0.25)
# another width, other patches, another size and normalisation than the student's 28 pixels
LARGE = BackboneSpec(image_size=40, patch_size=8, width=36, depth=2, heads=3, layer_scale=0.5)


def teacher(seed: int = 5) -> FeatureTeacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LARGE.build()
    return FeatureTeacher(network, "large", 40, (OTHER_MEAN, OTHER_STD), (MEAN, STD))


class Small(nn.Module):
    """A network with BatchNorm and without patches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 12, 7, 7, bias=False), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x))).mean((2, 3))


class Run:
    """A student and what it learns from."""

    def __init__(
        self, features: FeatureSpec | None = None, beside: bool = False, network: Any = None
    ) -> None:
        features = features or FeatureSpec()
        backbone: BackboneSpec | Backbone = SPEC
        if network is not None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                backbone = ModuleBackbone(network(), 12)
        self.pair = build_pair(backbone, HEAD if beside else None, None, seed=0)
        attach(self.pair, teacher(), features)
        weights = {} if beside else dict.fromkeys(("dino_weight", "ibot_weight", "koleo_weight"), 0)
        self.spec = ObjectiveSpec(**weights, features=features, distil=not beside)
        self.objective = Objective.for_pair(self.spec, self.pair)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.pair.student))

    def step(self, *micro: Views, **options: Any) -> StepResult:
        student = options.pop("forward", self.pair.student)
        return train_step(
            student, self.pair, micro, self.optimizer, VALUES, self.objective, **options
        )

    def weights(self) -> dict[str, Tensor]:
        """Without the key bias, whose gradient is round-off that Adam blows up."""
        return {
            f"{role}.{name}": x.detach().clone()
            for role in ("student", "teacher")
            for name, x in getattr(self.pair, role).named_parameters()
            if not name.endswith("qkv.bias")
        }


def seen_by_hand(v: Tensor) -> Tensor:
    """The student's views as the teacher's images, pixel by pixel where nothing is resized."""
    mean, std, own_mean, own_std = (
        torch.tensor(x)[:, None, None] for x in (MEAN, STD, OTHER_MEAN, OTHER_STD)
    )
    pixels = v * std + mean
    normalised = (pixels - own_mean) / own_std
    return nn.functional.interpolate(normalised, (40, 40), mode="bilinear", antialias=True)


@pytest.mark.parametrize("form", ["cosine", "smooth_l1"])
def test_a_step_by_hand(form: Any) -> None:
    """Loss of one step against plain loops; the teacher of features stays, the average moves."""
    run = Run(FeatureSpec(form, cls_weight=0.7, patch_weight=2.0))
    large = run.pair.feature_teacher
    assert large is not None and not any(p.requires_grad for p in large.parameters())
    assert run.pair.student.dino_head is None and run.pair.teacher.dino_head is None
    before = copy.deepcopy(large.state_dict())
    student = copy.deepcopy(run.pair.student)
    v = views(3)
    with torch.no_grad():
        theirs = large.network.forward_features(seen_by_hand(v.global_views))
        ours = student.backbone.forward_features(v.global_views)
        adapter = student.adapter
        cls, patches = theirs["x_norm_clstoken"], theirs["x_norm_patchtokens"]
        maps = patches.transpose(1, 2).reshape(6, 36, 5, 5)
        grid = nn.functional.interpolate(maps, (2, 2), mode="bilinear", antialias=True)
        rows = torch.stack([grid[i, :, y, x] for i in range(6) for y in (0, 1) for x in (0, 1)])
        expected = []
        for s, t in (
            (adapter.cls(ours["x_norm_clstoken"]), cls),
            (adapter.patch(ours["x_norm_patchtokens"].flatten(0, 1)), rows),
        ):
            t = (t - t.mean(0)) / t.std(0, unbiased=False)
            if form == "cosine":
                each = [1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(s, t, strict=True)]
            else:
                apart = (s - t).abs()
                each = torch.where(apart < 1, apart**2 / 2, apart - 0.5).mean(1).tolist()
            expected.append(sum(each) / len(each))
    scalars = run.step(v).scalars
    assert float(scalars["loss/distil_cls"]) == pytest.approx(expected[0], 1e-4)
    assert float(scalars["loss/distil_patch"]) == pytest.approx(expected[1], 1e-4)
    total = 0.7 * expected[0] + 2 * expected[1]
    assert float(scalars["loss/total"]) == pytest.approx(total, 1e-4)
    assert {name for name in scalars if name.startswith("loss/")} == {
        "loss/total",
        "loss/distil_cls",
        "loss/distil_patch",
    }
    assert "optim/grad_norm_adapter" in scalars
    assert all(torch.equal(x, before[n]) for n, x in large.state_dict().items())
    was = dict(student.named_parameters())
    now = dict(run.pair.student.named_parameters())
    for name, x in run.pair.teacher.named_parameters():
        torch.testing.assert_close(x.data, 0.9 * was[name].data + 0.1 * now[name].data)


def test_the_second_step_is_standardised_by_the_first() -> None:
    run = Run()
    first, second = views(3), views(3, seed=1)
    run.step(first)
    large = run.pair.feature_teacher
    assert large is not None
    with torch.no_grad():
        rows, other = (large(v.global_views, None).cls for v in (first, second))
        adapted = run.pair.student(second.global_views).adapted_cls
        target = (other - rows.mean(0)) / rows.std(0, unbiased=False)
        expected = (1 - torch.cosine_similarity(adapted, target)).mean()
    torch.testing.assert_close(run.step(second).scalars["loss/distil_cls"], expected)


def test_every_parameter_gets_a_gradient_also_beside_our_own_objective() -> None:
    for beside in (False, True):
        run = Run(beside=beside)
        scalars = run.step(views(3)).scalars
        missing = [n for n, p in run.pair.student.named_parameters() if p.grad is None]
        assert not missing
        assert ("loss/ibot" in scalars) is ("loss/koleo" in scalars) is beside
        if beside:
            s = scalars
            own = s["loss/dino_global"] + s["loss/dino_local"] + s["loss/ibot"]
            own = own + 0.1 * s["loss/koleo"]
            learnt = s["loss/distil_cls"] + s["loss/distil_patch"]
            torch.testing.assert_close(s["loss/total"], own + learnt)


def test_our_own_terms_are_those_without_the_teacher_of_features() -> None:
    from tests.train.small_run import Run as Plain

    for centring in ("softmax", "sinkhorn"):
        run = Run(beside=True)
        spec = replace(run.spec, centring=centring)
        run.objective = Objective.for_pair(spec, run.pair)
        plain = Plain(ObjectiveSpec(centring=centring))  # type: ignore[arg-type]
        ours = run.step(views(3), views(3, seed=1)).scalars
        theirs = plain.step(views(3), views(3, seed=1)).scalars
        for name in ("dino_global", "dino_local", "ibot", "koleo"):
            torch.testing.assert_close(ours[f"loss/{name}"], theirs[f"loss/{name}"])


@pytest.mark.parametrize("form", ["cosine", "smooth_l1"])
@pytest.mark.parametrize("beside", [False, True])
def test_accumulation_gives_the_gradient_of_the_whole_batch(form: Any, beside: bool) -> None:
    whole = views(6)
    whole.masks[:, :] = False
    whole.masks[:, 1] = True  # equal counts, so that a mean of means is the mean
    runs = [Run(FeatureSpec(form), beside) for _ in range(2)]
    for run in runs:
        run.objective.spec = replace(run.objective.spec, koleo_weight=0.0)  # of a micro batch
    for _ in range(3):
        first = runs[0].step(whole)
        second = runs[1].step(*split(whole, 3))
        for name, x in first.scalars.items():
            if name != "health/prototypes_used":
                torch.testing.assert_close(second.scalars[name], x, rtol=1e-4, atol=1e-5)
    assert_same(runs[0].weights(), runs[1].weights(), atol=2e-5)


def test_bad_images_count_in_no_term() -> None:
    counts = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    weighted, expected = Run(), Run()
    for seed in range(3):
        both = replace(views(5, seed), weights=counts)

        def kept(x: Tensor, both: Views = both) -> Tensor:
            return x[counts.repeat(len(x) // both.images) > 0]

        alone = Views(kept(both.global_views), kept(both.local_views), kept(both.masks), 3)
        other = views(5, seed + 9)
        ours = weighted.step(both, other).scalars
        theirs = expected.step(alone, other).scalars
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=2e-5, atol=2e-5, msg=name)
    assert_same(weighted.weights(), expected.weights(), atol=1e-5)


def test_a_batch_of_no_image_that_counts() -> None:
    run = Run()
    nothing = replace(views(3), weights=torch.zeros(3))
    scalars = run.step(nothing).scalars
    assert {float(x) for name, x in scalars.items() if name.startswith("loss/")} == {0.0}
    run.step(views(3))  # what has been seen of nothing does not stand in the way


def test_a_resumed_run_takes_the_same_steps() -> None:
    straight = Run()
    for seed in range(4):
        straight.step(views(3, seed))
        if seed == 1:
            kept = copy.deepcopy(
                {
                    "student": straight.pair.student.state_dict(),
                    "teacher": straight.pair.teacher.state_dict(),
                    "objective": straight.objective.state_dict(),
                    "optimizer": straight.optimizer.state_dict(),
                }
            )
    assert any(name.startswith("adapter.") for name in kept["student"])
    resumed = Run()
    resumed.pair.student.load_state_dict(kept["student"])
    resumed.pair.teacher.load_state_dict(kept["teacher"])
    resumed.objective.load_state_dict(kept["objective"])
    resumed.optimizer.load_state_dict(kept["optimizer"])
    for seed in (2, 3):
        resumed.step(views(3, seed))
    assert_same(resumed.weights(), straight.weights(), atol=0)


def test_a_step_that_was_not_applied_leaves_the_statistics_alone() -> None:
    from pipeline.train.step import NonFinite

    run = Run()
    run.step(views(3))
    before = copy.deepcopy(run.objective.state_dict())
    bad = views(3, seed=1)
    bad.global_views[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinite, match="distil_cls"):
        run.step(bad)
    after = run.objective.state_dict()
    assert all(
        torch.equal(x, after["features"]["cls"][n]) for n, x in before["features"]["cls"].items()
    )


def test_without_patches_the_features_of_the_image_are_learnt() -> None:
    run = Run(network=Small)
    assert run.pair.student.adapter is not None and run.pair.student.adapter.patch is None
    scalars = run.step(views(3)).scalars
    assert "loss/distil_cls" in scalars and "loss/distil_patch" not in scalars
    with pytest.raises(PipelineError, match=r"cls_weight is 0, and the student has no patches"):
        Run(FeatureSpec(cls_weight=0), network=Small)
    no_patches = FeatureTeacher(ModuleBackbone(Small(), 12), "x", 28, (MEAN, STD), (MEAN, STD))
    with pytest.raises(PipelineError, match=r"and the teacher x has no patches"):
        attach(build_pair(SPEC, None, None, 0), no_patches, FeatureSpec(cls_weight=0))


def test_patches_that_cannot_be_hidden_are_learnt_too() -> None:
    name = "pipeline.model.encoders.residual:small_map"
    files = read_source(Name.of(name))
    backbone = ModuleSpec(name, image_size=28, patch_size=7, files=files).build()
    pair = attach(build_pair(backbone, None, None, 0), teacher(), FeatureSpec())
    assert not backbone.takes_masks
    said = pair.student(torch.randn(2, 3, 28, 28))
    assert said.adapted_patches is not None and said.adapted_patches.shape == (2 * 16, 36)


def test_statistics_of_batchnorm_follow_like_the_weights() -> None:
    run = Run(network=Small)
    for _ in range(2):
        was = copy.deepcopy(run.pair.teacher.state_dict())
        run.step(views(3))
        student = run.pair.student.state_dict()
        for name, x in run.pair.teacher.state_dict().items():
            if "running" in name:
                torch.testing.assert_close(x, 0.9 * was[name] + 0.1 * student[name])


def test_the_loss_falls() -> None:
    run = Run()
    batch = views(8)
    totals = [float(run.step(batch).scalars["loss/total"]) for _ in range(60)]
    assert totals[-1] < 0.6 * totals[0]


def test_bfloat16_networks_and_float32_losses() -> None:
    exact, low = Run(), Run()
    a = exact.step(views(4)).scalars
    b = low.step(views(4), autocast_dtype=torch.bfloat16).scalars
    for name in ("loss/total", "loss/distil_cls", "loss/distil_patch"):
        assert b[name].dtype == torch.float32
        torch.testing.assert_close(b[name], a[name], rtol=3e-2, atol=2e-2)


def test_a_pair_and_an_objective_that_do_not_go_together() -> None:
    run = Run()
    with pytest.raises(PipelineError, match="the pair has a teacher of features"):
        Objective.for_pair(replace(run.spec, features=None, koleo_weight=1.0), run.pair)
    plain = build_pair(SPEC, HEAD, None, 0)
    with pytest.raises(PipelineError, match="the pair has no teacher of features"):
        Objective.for_pair(ObjectiveSpec(features=FeatureSpec()), plain)
    with pytest.raises(PipelineError, match="the pair has no heads"):
        Objective.for_pair(ObjectiveSpec(features=FeatureSpec()), run.pair)
    for spec in (FeatureSpec("l2"), FeatureSpec(cls_weight=-1.0)):  # type: ignore[arg-type]
        with pytest.raises(PipelineError, match="features are learnt by"):
            attach(plain, teacher(), spec)


def test_a_teacher_of_other_channels_or_sizes_is_refused() -> None:
    network = LARGE.build()
    with pytest.raises(PipelineError, match="images of 1 channels, the student's have 3"):
        FeatureTeacher(network, "x", 40, ((0.5,), (0.5,)), (MEAN, STD))
    with pytest.raises(PipelineError, match="takes no images of 42 x 42"):
        FeatureTeacher(network, "x", 42, (MEAN, STD), (MEAN, STD))


def test_maps_become_smaller_as_means_and_larger_between() -> None:
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    small = resampled(maps, (2, 2))
    torch.testing.assert_close(small.mean(), maps.mean())
    assert small[0, 0, 0, 0] < small[0, 0, 0, 1] < small[0, 0, 1, 0] < small[0, 0, 1, 1]
    large = resampled(torch.full((1, 1, 2, 2), 3.0), (5, 5))
    torch.testing.assert_close(large, torch.full((1, 1, 5, 5), 3.0))


def test_one_forward_of_a_pair_without_heads() -> None:
    run = Run()
    out = forward(run.pair, views(3), run.objective)
    assert (
        out.cls.shape == (2, 3, 36)
        and out.teacher_logits.shape == (2, 3, 0)[:0] + out.teacher_logits.shape
    )
    assert out.loss.requires_grad and set(out.parts) == {"total", "distil_cls", "distil_patch"}


def test_the_average_is_a_copy_with_its_own_adapter() -> None:
    run = Run()
    pair: Pair = pair_of(run.pair.student)
    assert pair.teacher.adapter is not run.pair.student.adapter
    encoded = run.pair.teacher(views(3).global_views)
    assert encoded.adapted_cls is None and encoded.dino.shape == (0, 0)
