"""What a run starts from: given weights, checkpoints of ours, and the frozen teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.errors import PipelineError
from pipeline.loss.prototypes import STUDENT_TEMPERATURE
from pipeline.model.pair import HeadSpec, build_pair, freeze
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.train import build, start
from pipeline.train.checkpoint import state
from pipeline.train.objective import ObjectiveSpec
from tests.train.small_run import HEAD, SPEC, Run, views

SMALL = [
    "augment.global_size=28",
    "augment.local_size=14",
    "augment.local_crops=2",
    "model.width=24",
    "model.depth=2",
    "model.heads=2",
    "model.registers=1",
    "head.prototypes=20",
    "head.bottleneck=8",
    "head.hidden=16",
    "optim.steps=10",
    "optim.global_batch_size=4",
]


MACHINE = Machine(cpus=2, gpus=0, bfloat16=False)


def config(*overrides: str) -> Config:
    return load([*SMALL, *overrides])


def planned(*overrides: str) -> Plan:
    """As a run begins: with the checkpoints looked up."""
    plan = resolve(config(*overrides), SetFacts(100, "d"), machine=MACHINE)
    return start.located(plan, None)


def run_folder(path: Path, *overrides: str, seed: int = 7) -> Path:
    """A run folder with one checkpoint, as a run leaves it."""
    recipe = config(f"run.seed={seed}", *overrides)
    plan = resolve(recipe, SetFacts(100, "d"), machine=MACHINE)
    pair = build.pair(recipe)
    with torch.no_grad():
        for p in pair.teacher.parameters():  # not the student's any more
            p.add_(0.01)
    objective = build.objective(recipe, pair)
    objective.dino_centre.value += 3.0
    tensors = {
        "student": pair.student.state_dict(),
        "teacher": pair.teacher.state_dict(),
        "objective": objective.state_dict(),
    }
    state.save(path / "checkpoints", 10, tensors, {"plan": plan.model_dump(mode="json")})
    return path


def test_a_run_of_ours_starts_both_from_its_teacher_with_heads(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "first")
    pair, text = start.starting_pair(planned(f"model.init={folder}"))
    saved = state.latest(folder / "checkpoints").load()["teacher"]  # type: ignore[union-attr]
    for encoder in (pair.student, pair.teacher):
        weights = encoder.state_dict()
        assert weights.keys() == saved.keys()
        assert all(torch.equal(x, saved[name]) for name, x in weights.items())
    assert text.endswith("with dino_head")
    assert all(p.requires_grad for p in pair.student.parameters())
    assert not any(p.requires_grad for p in pair.teacher.parameters())


def test_a_run_that_goes_on_keeps_the_weights_it_began_with(tmp_path: Path) -> None:
    """The first run trains on meanwhile: its folder then means another checkpoint."""
    folder = run_folder(tmp_path / "large")
    began = planned(f"distill.teacher={folder}", f"model.init={folder}")
    assert began.frozen_teacher == began.init == str(folder / "checkpoints" / "step-00000010")
    later = state.latest(folder / "checkpoints")
    assert later is not None
    state.save(folder / "checkpoints", 20, later.load(), later.meta)
    own = state.save(tmp_path / "own", 3, {}, {"plan": began.model_dump(mode="json")})
    again = planned(f"distill.teacher={folder}", f"model.init={folder}")
    assert again.frozen_teacher.endswith("step-00000020")
    assert start.located(again, own) == began


def test_centres_come_with_the_heads(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "first")
    for overrides, expected in (
        ([f"model.init={folder}"], 3.0),
        ([f"distill.teacher={folder}"], 3.0),
        ([f"model.init={folder}", "head.prototypes=30"], 0.0),
        ([], 0.0),
    ):
        plan = planned(*overrides)
        pair = start.with_frozen_teacher(start.starting_pair(plan)[0], plan)
        objective = build.objective(plan.config, pair)
        start.carry_centres(objective, pair, plan)
        assert objective.dino_centre.value.unique().tolist() == [expected]
        assert objective.ibot_centre.value.unique().tolist() == [0.0]


def test_a_teacher_without_ibot_has_no_targets_for_patches(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "dino", "objective=dino")
    plan = planned(f"distill.teacher={folder}", "distill.loss=targets")
    with pytest.raises(PipelineError, match=r"trained with loss\.ibot_weight=0"):
        start.with_frozen_teacher(build.pair(plan.config), plan)
    plan = planned(f"distill.teacher={folder}", "loss.ibot_weight=0")
    assert start.with_frozen_teacher(build.pair(plan.config), plan).frozen is not None


def test_a_head_that_is_left_out_is_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "first", "ibot_head.separate=true", "ibot_head.prototypes=12")
    _, text = start.starting_pair(planned(f"model.init={folder}"))
    assert text.endswith("with dino_head; its ibot_head is left out")


def test_heads_of_another_shape_are_new(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "first")
    plan = planned(f"model.init={folder}", "head.prototypes=30")
    pair, text = start.starting_pair(plan)
    assert "without heads; dino_head of another shape, new" in text
    assert torch.equal(
        pair.student.dino_head.last_layer.weight_v,
        build.pair(plan.config).student.dino_head.last_layer.weight_v,
    )


def test_a_larger_image_size_resizes_the_positions(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "first")
    larger = ["augment.global_size=56", f"model.init={folder}"]
    with pytest.raises(PipelineError) as caught:
        start.starting_pair(planned(*larger))
    assert "model.init_resize=true" in str(caught.value) + caught.value.hint
    pair, _ = start.starting_pair(planned(*larger, "model.init_resize=true"))
    small, _ = start.starting_pair(planned(f"model.init={folder}"))
    # the first phase's own interpolation is the reference: the features agree at the new size
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        pair.teacher.backbone(x), small.teacher.backbone(x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("path", ["runs/nothing", "runs/nothing.pth"])
def test_no_weights_there(path: str) -> None:
    with pytest.raises(PipelineError, match="nothing"):
        start.starting_pair(planned(f"model.init={path}"))


def test_the_frozen_teacher_is_the_checkpoints(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "large", "model.width=48", "model.depth=3")
    plan = planned(f"distill.teacher={folder}")
    recipe = plan.config
    pair = start.with_frozen_teacher(build.pair(recipe), plan)
    saved = state.latest(folder / "checkpoints").load()["teacher"]  # type: ignore[union-attr]
    assert pair.frozen is not None and pair.target_maker is pair.frozen
    assert all(torch.equal(x, saved[n]) for n, x in pair.frozen.state_dict().items())
    assert not any(p.requires_grad for p in pair.frozen.parameters())
    assert (recipe.loss.mask_probability, recipe.model.drop_path) == (0, 0)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("head.prototypes=30", "its head has 20 prototypes, the student's 30"),
        ("ibot_head.separate=true", "its ibot_head has no prototypes"),
        ("model.patch_size=7", "its patches have 14 pixels, the student's 7"),
        ("augment.mean=[0.5,0.5,0.5]", "was trained with mean, std, channels"),
    ],
)
def test_a_frozen_teacher_that_does_not_fit(tmp_path: Path, override: str, what: str) -> None:
    folder = run_folder(tmp_path / "large")
    plan = planned(f"distill.teacher={folder}", "distill.loss=targets", override)
    with pytest.raises(PipelineError, match=what):
        start.with_frozen_teacher(build.pair(plan.config), plan)


def test_exported_weights_have_no_heads_to_distil_from(tmp_path: Path) -> None:
    plan = planned(f"distill.teacher={tmp_path}", "distill.loss=targets")
    with pytest.raises(PipelineError, match="holds no checkpoint of ours") as caught:
        start.with_frozen_teacher(build.pair(plan.config), plan)
    assert "no heads" in caught.value.hint


def test_a_distillation_step_by_hand() -> None:
    """Loss of one step against plain loops: targets of the frozen network, no masks, iBOT on every
    patch; the teacher is the moving average of the student and the frozen network stays.
    """
    spec = ObjectiveSpec(distil=True, koleo_weight=0.0)
    run = Run(spec)
    large = build_pair(replace(SPEC, width=36, heads=3), HEAD, None, seed=5).teacher
    run.pair.frozen = freeze(large, run.pair.student)
    before = {n: x.clone() for n, x in large.state_dict().items()}
    student = {n: x.clone() for n, x in run.pair.student.state_dict().items()}
    v = views(3)

    def log_q(encoder: torch.nn.Module, x: torch.Tensor, temperature: float) -> tuple:
        with torch.no_grad():
            tokens = encoder.backbone.forward_features(x)
            scored = [
                torch.log_softmax(encoder.dino_head(tokens[name]) / temperature, -1)
                for name in ("x_norm_clstoken", "x_norm_patchtokens")
            ]
        return tuple(scored)

    t_cls, t_patch = log_q(large, v.global_views, 0.07)
    s_cls, s_patch = log_q(run.pair.student, v.global_views, STUDENT_TEMPERATURE)
    l_cls, _ = log_q(run.pair.student, v.local_views, STUDENT_TEMPERATURE)
    pairs = 0.0
    for a in range(2):
        for b in range(4):  # two global, two local views of the student
            if a == b:
                continue
            s = s_cls[b * 3 : b * 3 + 3] if b < 2 else l_cls[(b - 2) * 3 : (b - 2) * 3 + 3]
            pairs += float(-(t_cls[a * 3 : a * 3 + 3].exp() * s).sum(-1).mean()) / 6
    patches = float(-(t_patch.exp() * s_patch).sum(-1).mean())

    scalars = run.step(v).scalars
    assert float(scalars["loss/dino_global"] + scalars["loss/dino_local"]) == pytest.approx(
        pairs, 1e-5
    )
    assert float(scalars["loss/ibot"]) == pytest.approx(patches, 1e-5)
    assert all(torch.equal(x, before[n]) for n, x in large.state_dict().items())
    for (name, teacher), now in zip(
        run.pair.teacher.named_parameters(), run.pair.student.parameters(), strict=True
    ):
        torch.testing.assert_close(teacher.data, 0.9 * student[name] + 0.1 * now.data)


def test_the_objective_of_dino_is_that_of_the_paper() -> None:
    """DINO (Caron et al. 2021), algorithm 1 written out: every teacher view against every other
    view of the student, the centre moved by the batch after its use.
    """
    recipe = config("objective=dino")
    assert (recipe.loss.ibot_weight, recipe.loss.koleo_weight) == (0, 0)
    assert (recipe.loss.mask_probability, recipe.teacher.momentum) == (0, 0.996)
    assert recipe.loss.centring == "softmax" and recipe.loss.centre_momentum == 0.9
    run = Run(ObjectiveSpec(ibot_weight=0, koleo_weight=0), None)
    assert build.objective(recipe, run.pair).spec == run.objective.spec
    centre = torch.zeros(HEAD.prototypes)
    for seed in range(3):
        v = views(3, seed, masked=False)
        with torch.no_grad():
            t = run.pair.teacher.dino_head(run.pair.teacher.backbone(v.global_views))
            student = run.pair.student
            s = [student.dino_head(student.backbone(x)) for x in (v.global_views, v.local_views)]
        q = torch.softmax((t - centre) / 0.07, -1).chunk(2)
        p = [x for part in s for x in torch.log_softmax(part / 0.1, -1).split(3)]
        terms = [-(q[a] * p[b]).sum(-1).mean() for a in range(2) for b in range(4) if a != b]
        centre = 0.9 * centre + 0.1 * t.mean(0)
        scalars = run.step(v).scalars
        torch.testing.assert_close(scalars["loss/total"], torch.stack(terms).mean())
        assert "loss/ibot" not in scalars and "loss/koleo" not in scalars


def test_a_frozen_backbone_stays_while_the_heads_learn() -> None:
    run = Run(ibot=HeadSpec(12, 4, 16))
    recipe = config("train.freeze_backbone_steps=2", "optim.warmup=0", "optim.freeze_last_layer=0")
    plan = resolve(recipe, SetFacts(100, "d"), machine=MACHINE)
    from pipeline.train.step import train_step

    moved = []
    for step in range(4):
        before = {n: p.detach().clone() for n, p in run.pair.student.named_parameters()}
        train_step(
            run.pair.student, run.pair, [views(3)], run.optimizer, plan.at(step), run.objective
        )
        now = dict(run.pair.student.named_parameters())
        moved.append({n.split(".")[0] for n, x in before.items() if not torch.equal(now[n], x)})
    heads = {"dino_head", "ibot_head"}
    assert moved == [heads, heads, heads | {"backbone"}, heads | {"backbone"}]
