"""Properties of the step: accumulation, absent terms, precision, workers, and what stops it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.loss.koleo import koleo
from pipeline.loss.target import sinkhorn_targets
from pipeline.model.pair import HeadSpec, Pair
from pipeline.train import objective as objective_module
from pipeline.train.step import NonFinite, Objective, ObjectiveSpec, train_step
from pipeline.views.batch import Views
from tests.train.small_run import OTHER_HEAD, VALUES, Run, assert_same, poison_view, split, views

KEYS = {"loss/total", "optim/grad_norm", "optim/grad_norm_backbone", "optim/grad_norm_dino_head"}
DINO_KEYS = {"loss/dino_global", "loss/dino_local", "health/teacher_entropy"}
DINO_KEYS |= {"health/student_teacher_kl", "health/prototypes_used"}


@pytest.mark.parametrize("ibot", [None, OTHER_HEAD], ids=["shared", "separate"])
@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("local_crops", [0, 2])
def test_every_parameter_gets_a_gradient(
    ibot: HeadSpec | None, centring: Any, local_crops: int
) -> None:
    run = Run(ObjectiveSpec(centring=centring), ibot)
    result = run.step(views(3, local_crops=local_crops))
    missing = [n for n, p in run.pair.student.named_parameters() if p.grad is None]
    assert not missing
    expected = KEYS | DINO_KEYS | {"loss/ibot", "loss/koleo"}
    assert set(result.scalars) == expected | ({"optim/grad_norm_ibot_head"} if ibot else set())
    assert all(x.dim() == 0 and torch.isfinite(x) for x in result.scalars.values())
    assert not any(x.requires_grad for x in result.scalars.values())
    s = result.scalars
    total = s["loss/dino_global"] + s["loss/dino_local"] + s["loss/ibot"] + 0.1 * s["loss/koleo"]
    torch.testing.assert_close(s["loss/total"], total)
    assert (float(s["loss/dino_local"]) == 0) == (local_crops == 0)
    assert 1 <= float(s["health/prototypes_used"]) <= 6
    assert float(s["health/student_teacher_kl"]) >= -1e-5


@pytest.mark.parametrize("ibot", [None, OTHER_HEAD], ids=["shared", "separate"])
@pytest.mark.parametrize("absent", ["dino", "ibot", "koleo"])
def test_a_term_of_weight_0_is_left_out(absent: str, ibot: HeadSpec | None) -> None:
    spec = replace(ObjectiveSpec(), **{f"{absent}_weight": 0.0})
    run = Run(spec, ibot)
    result = run.step(views(3))
    assert all(p.grad is not None for p in run.pair.student.parameters())
    gone = DINO_KEYS if absent == "dino" else {f"loss/{absent}"}
    assert not gone & set(result.scalars)
    if absent != "koleo":  # the same gradient as with the term, but for its part
        assert torch.isfinite(result.scalars["loss/total"])


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
@pytest.mark.parametrize(("global_crops", "local_crops"), [(2, 1), (3, 0), (3, 2), (4, 1)])
def test_a_step_of_any_number_of_views_is_a_loop_over_all_pairs(
    centring: Any, global_crops: int, local_crops: int
) -> None:
    images = 3
    g = torch.Generator().manual_seed(global_crops)
    both = Views(
        torch.randn(global_crops * images, 3, 28, 28, generator=g),
        torch.randn(local_crops * images, 3, 14, 14, generator=g),
        torch.rand(global_crops * images, 4, generator=g) < 0.4,
        images,
    )
    run = Run(ObjectiveSpec(centring=centring), OTHER_HEAD)
    student, teacher = run.pair.student, run.pair.teacher
    for network in (student, teacher):
        for parameter in network.parameters():  # as they are, all images look alike
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=g)
    with torch.no_grad():
        masked = both.masks.flatten().nonzero().squeeze(1)
        theirs = teacher(both.global_views, None, None, masked)
        ours = student(both.global_views, both.local_views, both.masks, masked)
        ours_locals = ours.dino[global_crops * images :]

        def targets(logits: torch.Tensor) -> torch.Tensor:
            if centring == "softmax":
                return (logits / VALUES.teacher_temperature).softmax(dim=1)
            (target,) = sinkhorn_targets([logits], VALUES.teacher_temperature)
            return target.probabilities()

        q = targets(theirs.dino).view(global_crops, images, -1)
        s = torch.cat([ours.dino[: global_crops * images], ours_locals])
        s = (s / 0.1).log_softmax(dim=1).view(global_crops + local_crops, images, -1)
        pairs = [
            (-(q[j] * s[i]).sum(dim=1).mean(), i < global_crops)
            for i in range(global_crops + local_crops)
            for j in range(global_crops)
            if i != j
        ]
        of_globals = [value for value, is_global in pairs if is_global]
        dino = [
            sum(v for v, which in pairs if which == kind) / len(pairs) for kind in (True, False)
        ]
        patches = (targets(theirs.ibot) * (ours.ibot / 0.1).log_softmax(dim=1)).sum(dim=1)
        view_of = masked // 4
        of_views = [patches[view_of == v].mean() for v in view_of.unique()]
        ibot = -sum(of_views) / (global_crops * images)
        spread = sum(koleo(x) for x in ours.cls.view(global_crops, images, -1))
        entropy = -(q * q.log()).nan_to_num().sum(dim=2).mean()
    scalars = run.step(both).scalars
    expected = {"dino_global": dino[0], "dino_local": dino[1], "ibot": ibot, "koleo": spread}
    for name, value in expected.items():
        torch.testing.assert_close(
            scalars[f"loss/{name}"],
            torch.as_tensor(value, dtype=torch.float32),
            rtol=1e-4,
            atol=1e-5,
        )
    divergence = sum(of_globals) / len(of_globals) - entropy
    torch.testing.assert_close(
        scalars["health/student_teacher_kl"], divergence, rtol=1e-3, atol=1e-4
    )


def test_views_that_no_step_can_use_are_refused_with_their_shapes() -> None:
    x, hidden = torch.randn, torch.zeros(12, 16, dtype=torch.bool)
    refused: list[tuple[Callable[[], object], str]] = [
        # 3 global views of 4 images, 4 of 4, 1 of 4: rows alone say 6, 8 and 2 images
        (lambda: Views(x(12, 3, 8, 8), x(8, 3, 4, 4), hidden), "not those of 6 images"),
        (lambda: Views(x(8, 3, 8, 8), x(2, 3, 4, 4), hidden[:8]), "not those of 4 images"),
        (
            lambda: Views(x(4, 3, 8, 8), x(8, 3, 4, 4), hidden[:4]),
            "two of each of 2 images, or one",
        ),
        (lambda: Views(x(4, 3, 8, 8), x(8, 3, 4, 4), hidden[:4], 4), "not those of 4 images"),
        (lambda: Views(x(3, 3, 8, 8), x(0, 3, 4, 4), hidden[:3]), "not those of 1 images"),
        (lambda: Views(x(0, 3, 8, 8), x(0, 3, 4, 4), hidden[:0]), "not those of 0 images"),
        (lambda: Views(x(12, 3, 8, 8), x(12, 3, 4, 4), hidden[:6]), "masks [6, 16]"),
        (lambda: Views(x(12, 3, 8, 8), x(12, 3, 4, 4), hidden[:, 0]), "masks [12]"),
        (lambda: Views(x(12, 3, 8, 8), x(12, 3, 4, 4), hidden.float()), "not torch.float32"),
        (lambda: Views(x(12, 3, 8, 8), x(12, 1, 4, 4), hidden), "different channels"),
        (lambda: Views(x(12, 8, 8), x(12, 8, 4), hidden), "global views [12, 8, 8]"),
        (lambda: Views(x(12, 3, 8, 8).byte(), x(0, 3, 4, 4), hidden), "normalised floats"),
        (lambda: Run().step(), "got an empty list"),
        (lambda: Run().step(views(3), generator=[torch.Generator()] * 2), "2 generators for 1"),
        (lambda: Run().step(replace(views(3), masks=hidden[:6])), "masks [6, 16] for 4 patches"),
        (lambda: Run().step(replace(views(3), masks=hidden[:6, :1])), "masks [6, 1] for 4 patches"),
    ]
    for call, said in refused:
        with pytest.raises(PipelineError) as error:
            call()
        assert said in error.value.what and error.value.hint, error.value.what
    both = views(3)
    run = Run()
    with pytest.raises(PipelineError, match=r"got Views, expected a list"):
        train_step(run.pair.student, run.pair, both, run.optimizer, VALUES, run.objective)  # type: ignore[arg-type]


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
@pytest.mark.parametrize("ibot", [None, OTHER_HEAD], ids=["shared", "separate"])
def test_masked_patches_are_filled_up_to_few_lengths_and_nothing_else_changes(
    ibot: HeadSpec | None, centring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [views(8, seed) for seed in range(12)]
    exact, filled = (Run(ObjectiveSpec(centring=centring), ibot) for _ in range(2))
    lengths = {}
    for name, run, steps in (("exact", exact, 64), ("filled", filled, 4)):
        monkeypatch.setattr(objective_module, "PATCH_STEPS", steps)  # of 64 patches: each, and 16
        lengths[name] = {len(run.objective.masked(batch).places) for batch in batches}
        scalars = [run.step(batch).scalars for batch in batches[:3]]
        if name == "exact":
            expected = scalars
            counts = [int(batch.masks.sum()) for batch in batches]
            assert lengths["exact"] == set(counts) and len(set(counts)) > 5
            continue
        assert lengths["filled"] <= {16, 32, 48, 64} and len(lengths["filled"]) < 4
        for ours, value in zip(scalars, expected, strict=True):
            for key in value:
                torch.testing.assert_close(ours[key], value[key], rtol=1e-5, atol=1e-5)
    assert_same(filled.weights(), exact.weights(), atol=1e-5)


def test_no_masked_patch_at_all() -> None:
    run = Run(ibot=OTHER_HEAD)
    result = run.step(views(3, masked=False), views(3, seed=1, masked=False))
    assert float(result.scalars["loss/ibot"]) == 0
    assert all(p.grad is not None for p in run.pair.student.parameters())
    run.step(views(3))


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(centring: Any) -> None:
    # KoLeo sees the micro batch only, so it stays out of this comparison.
    spec = ObjectiveSpec(koleo_weight=0.0, centring=centring)
    whole = views(6)
    whole.masks[:, :] = False
    whole.masks[:, 1] = True  # equal counts, so that a mean of means is the mean
    runs = [Run(spec, OTHER_HEAD) for _ in range(2)]
    for _ in range(2):
        first = runs[0].step(whole)
        second = runs[1].step(*split(whole, 3))
        for name, x in first.scalars.items():
            if name != "health/prototypes_used":
                torch.testing.assert_close(second.scalars[name], x, rtol=1e-4, atol=1e-5)
    assert_same(runs[0].weights(), runs[1].weights(), atol=2e-5)


def test_the_generator_alone_decides() -> None:
    results = []
    for seed in (1, 1, 2):
        run = Run(drop_path=0.5)
        torch.manual_seed(len(results))  # must not matter
        run.step(views(4), views(4, seed=1), generator=torch.Generator().manual_seed(seed))
        results.append(run.weights())
    assert_same(results[0], results[1], atol=0)
    with pytest.raises(AssertionError):
        assert_same(results[0], results[2], atol=1e-6)


def test_bfloat16_networks_and_float32_losses() -> None:
    exact, low = Run(ibot=OTHER_HEAD), Run(ibot=OTHER_HEAD)
    a = exact.step(views(4)).scalars
    b = low.step(views(4), autocast_dtype=torch.bfloat16).scalars
    for name in ("loss/total", "loss/dino_global", "loss/ibot", "loss/koleo"):
        assert b[name].dtype == torch.float32
        torch.testing.assert_close(b[name], a[name], rtol=2e-2, atol=2e-2)
    grads = [
        torch.cat([p.grad.flatten() for p in r.pair.student.parameters()]) for r in (exact, low)
    ]
    assert torch.cosine_similarity(grads[0], grads[1], dim=0) > 0.98
    assert all(p.dtype == torch.float32 for p in low.pair.student.parameters())


def test_a_resumed_run_takes_the_same_steps() -> None:
    straight = Run(ibot=OTHER_HEAD)
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
    resumed = Run(ibot=OTHER_HEAD)
    resumed.pair.student.load_state_dict(kept["student"])
    resumed.pair.teacher.load_state_dict(kept["teacher"])
    resumed.objective.load_state_dict(kept["objective"])
    resumed.optimizer.load_state_dict(kept["optimizer"])
    for seed in (2, 3):
        resumed.step(views(3, seed))
    assert_same(resumed.weights(), straight.weights(), atol=0)


def test_a_checkpoint_with_other_prototypes_is_refused() -> None:
    with pytest.raises(PipelineError, match="dino centre has 12 prototypes, the head has 20"):
        Objective(ObjectiveSpec(), 20, 20).load_state_dict(
            Objective(ObjectiveSpec(), 12, 20).state_dict()
        )


@pytest.mark.parametrize(
    ("poison", "named"),
    [
        (lambda run, v: poison_view(v), "loss/dino_local"),
        (
            lambda run, v: (
                run.pair.student.ibot_head.last_layer.weight_g.data.fill_(float("inf")),
                v,
            )[1],
            "loss/ibot",
        ),
    ],
)
def test_a_value_that_is_not_finite_stops_before_the_update(
    poison: Callable[[Run, Views], Views], named: str
) -> None:
    run = Run(ibot=OTHER_HEAD)
    bad = poison(run, views(3))
    before = run.weights()
    with pytest.raises(NonFinite, match=named) as error:
        run.step(bad)
    assert named in error.value.names and "loss/dino_global" not in error.value.names
    assert_same(run.weights(), before, atol=0)


def test_a_step_that_was_not_applied_leaves_the_centres_alone() -> None:
    run, twin = Run(), Run()
    for each in (run, twin):
        each.step(views(3))
    bad = views(3, seed=1)
    bad.global_views[0, 0, 0, 0] = float("nan")  # the teacher sees it too
    with pytest.raises(NonFinite):
        run.step(bad)
    for each in (run, twin):
        each.step(views(3, seed=2))
    assert_same(run.weights(), twin.weights(), atol=0)
    assert torch.equal(run.objective.dino_centre.value, twin.objective.dino_centre.value)


@pytest.mark.parametrize(
    "spec",
    [
        ObjectiveSpec(centring="none"),  # type: ignore[arg-type]
        ObjectiveSpec(dino_weight=-1.0),
        ObjectiveSpec(dino_weight=0.0, ibot_weight=0.0, koleo_weight=0.0),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(spec: ObjectiveSpec) -> None:
    with pytest.raises(PipelineError):
        Objective(spec, 4, 4)


def test_a_pair_moves_whole() -> None:
    pair: Pair = Run().pair.to("meta")
    assert all(p.is_meta for m in (pair.student, pair.teacher) for p in m.parameters())
