"""The derivation against planted facts: what follows from them, and that a user's value stays."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import yaml

from pipeline.adapt.derive import derive, facts_alone
from pipeline.adapt.networks import Facts
from pipeline.adapt.recipe import Line, Recipe, written
from pipeline.config.config import Config
from pipeline.config.load import field_paths, load
from pipeline.errors import ConfigError
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve

VIT = Facts(
    init="/w/vits14.pth",
    what="a ViT",
    values={
        "model.encoder": "dinov2", "model.width": 384, "model.depth": 12, "model.heads": 6,
        "model.patch_size": 14, "model.in_channels": 3, "model.registers": 4,
        "augment.mean": [0.5, 0.5, 0.5], "augment.std": [0.25, 0.25, 0.25],
    },
    image_size=518, own_grid=518, patch_size=14, width=384, depth=12, has_layers=True,
    has_heads=False, parameters=22_000_000,
)  # fmt: skip
CONVNET = Facts(
    init="/w/lite0",
    what="timm:tf_efficientnet_lite0",
    values={"model.encoder": "timm:resnet10t", "model.patch_size": 1, "model.in_channels": 3},
    image_size=224, own_grid=None, patch_size=0, width=1280, depth=0, has_layers=True,
    has_heads=False, parameters=3_400_000,
)  # fmt: skip
SIZES = (20, 100, 577, 10_000, 1_000_000)


def asked(*fields: str) -> Config:
    return load(["model.init=/w", "adapt.enabled=true", *fields])


def values(recipe: Recipe) -> dict[str, object]:
    return {line.field: line.value for line in recipe.lines}


@pytest.mark.parametrize("images", SIZES)
@pytest.mark.parametrize("facts", [VIT, CONVNET], ids=["vit", "convnet"])
@pytest.mark.parametrize("gpu", [True, False])
def test_every_recipe_is_whole_and_has_a_plan(facts: Facts, images: int, gpu: bool) -> None:
    config = asked()
    recipe = derive(config, facts, images, gpu)
    known = {path for path, _ in field_paths()}
    assert {line.field for line in recipe.lines} <= known
    assert len({line.field for line in recipe.lines}) == len(recipe.lines)
    assert all(line.reason for line in recipe.lines)
    machine = Machine(cpus=16, gpus=int(gpu), bfloat16=True)
    plan = resolve(recipe.applied(config), SetFacts(images, "d"), machine)
    frozen = plan.config.train.freeze_backbone_steps
    assert 0 < frozen < plan.steps / 2  # the backbone learns for most of the run
    assert plan.at(0).backbone_lr == 0.0
    assert plan.at(frozen).backbone_lr != 0.0
    highest = max(plan.at(step).lr for step in range(0, plan.steps, max(1, plan.steps // 100)))
    assert plan.at(frozen).lr < highest  # what is let go is let go on the ramp
    assert plan.config.optim.global_batch_size <= images
    assert math.log2(plan.config.head.prototypes).is_integer()
    assert plan.steps * plan.config.optim.global_batch_size >= images  # all images are seen


def test_few_images_get_fewer_steps_and_smaller_heads() -> None:
    recipes = [values(derive(asked(), VIT, images, True)) for images in SIZES]
    for field in ("optim.steps", "head.prototypes", "optim.global_batch_size"):
        rising = [recipe[field] for recipe in recipes]
        assert rising == sorted(rising) and rising[0] < rising[-1], field  # type: ignore[type-var]
    passes = [
        recipe["optim.steps"] * recipe["optim.global_batch_size"] / images  # type: ignore[operator]
        for recipe, images in zip(recipes[2:], SIZES[2:], strict=True)
    ]
    assert passes == sorted(passes, reverse=True)


def test_sizes_follow_the_weights() -> None:
    large = values(derive(asked(), VIT, 10_000, True))
    assert large["augment.global_size"] == 224 and large["model.init_resize"] is True
    assert large["augment.local_size"] == 98
    assert large["augment.mean"] == [0.5, 0.5, 0.5]
    small = Facts(**{**vars(VIT), "image_size": 56, "own_grid": 56})
    recipe = values(derive(asked(), small, 10_000, True))
    assert recipe["augment.global_size"] == 56 and "model.init_resize" not in recipe
    assert recipe["augment.local_size"] == 28 and recipe["augment.blur"] == "none"
    convnet = values(derive(asked(), CONVNET, 10_000, True))
    assert convnet["loss.ibot_weight"] == 0 and convnet["loss.mask_probability"] == 0
    assert "loss.ibot_weight" not in large
    assert "optim.patch_embed_lr" not in convnet


def test_heads_that_come_along_learn_from_the_first_step() -> None:
    run = Facts(**{**vars(VIT), "has_heads": True, "values": {"head.prototypes": 512}})
    recipe = values(derive(asked(), run, 10_000, True))
    assert recipe["train.freeze_backbone_steps"] == 0
    assert recipe["head.prototypes"] == 512
    assert "loss.centring" not in recipe


def test_heads_of_another_shape_are_new_and_learn_alone_first() -> None:
    run = Facts(**{**vars(VIT), "has_heads": True, "values": {"head.prototypes": 512}})
    recipe = values(derive(asked("head.prototypes=64"), run, 10_000, True))
    assert recipe["head.prototypes"] == 64
    assert recipe["train.freeze_backbone_steps"] > 0  # type: ignore[operator]
    same = values(derive(asked("head.prototypes=512"), run, 10_000, True))
    assert same["train.freeze_backbone_steps"] == 0


def test_crops_of_a_run_of_ours_stay_whatever_their_size() -> None:
    run = Facts(**{**vars(VIT), "has_heads": True, "values": {"augment.global_size": 518}})
    recipe = derive(asked(), run, 10_000, True)
    sizes = [line.value for line in recipe.lines if line.field == "augment.global_size"]
    assert sizes == [518] and "model.init_resize" not in values(recipe)


def test_null_leaves_a_field_open() -> None:
    plain = derive(asked(), VIT, 10_000, True).applied(asked()).model_dump()
    for field in ("optim.steps=null", "optim.passes=null"):
        config = asked(field)
        assert derive(config, VIT, 10_000, True).applied(config).model_dump() == plain


def test_a_recipe_that_was_derived_before_takes_passes() -> None:
    recipe = derive(asked(), VIT, 10_000, True)
    applied = recipe.applied(asked("optim.passes=3"))
    assert applied.optim.passes == 3 and applied.optim.steps is None
    again = recipe.with_line(Line("optim.steps", 7, "fewer", "images"))
    assert values(again)["optim.steps"] == again.applied(asked()).optim.steps == 7
    assert len(again.lines) == len(recipe.lines)


def test_a_users_value_stays_and_is_said_to_be_theirs() -> None:
    fields = [
        "optim.lr=0.0123", "head.prototypes=99", "augment.global_size=112", "optim.steps=77",
        "loss.centring=softmax", "model.registers=7", "train.freeze_backbone_steps=5",
    ]  # fmt: skip
    config = asked(*fields)
    recipe = derive(config, VIT, 10_000, True)
    applied = recipe.applied(config)
    lines = {line.field: line for line in recipe.lines}
    for field in fields:
        name, _, value = field.partition("=")
        section, _, leaf = name.partition(".")
        assert str(getattr(getattr(applied, section), leaf)) == value
        assert lines[name].whose == "yours" and lines[name].reason == "as you set it"
    assert lines["augment.local_size"].value == round(112 * 98 / 224 / 14) * 14
    assert lines["train.eval_every"].value == 8  # a tenth of the user's 77 steps


def test_passes_of_the_user_are_kept() -> None:
    config = asked("optim.passes=3")
    recipe = derive(config, VIT, 10_000, True)
    applied = recipe.applied(config)
    assert applied.optim.passes == 3 and applied.optim.steps is None
    assert [line.whose for line in recipe.lines if line.field == "optim.passes"] == ["yours"]


def test_the_same_facts_give_the_same_recipe_and_it_survives_its_file() -> None:
    config = asked("optim.lr=0.01")
    recipe = derive(config, VIT, 577, False)
    assert derive(config, VIT, 577, False) == recipe
    again = Recipe.from_json(recipe.to_json())
    assert again.applied(config) == recipe.applied(config)
    applied = recipe.applied(config)
    text = written(recipe, applied)
    read = yaml.safe_load(text)
    assert "adapt" not in read
    whole = applied.model_dump(mode="json", exclude={"adapt"})
    assert Config.model_validate(read).model_dump(mode="json", exclude={"adapt"}) == whole
    for line in recipe.lines:
        leaf = line.field.partition(".")[2]
        assert any(
            one.strip().startswith(f"{leaf}:") and one.endswith(f"# {line.reason}")
            for one in text.splitlines()
        ), line


def test_values_that_do_not_fit_are_refused_with_their_fields() -> None:
    config = asked("augment.global_size=100")
    with pytest.raises(ConfigError, match=r"augment\.global_size=100 is not a multiple"):
        derive(config, VIT, 577, True).applied(config)


def test_what_the_weights_say_is_known_before_the_images_are() -> None:
    """A job's first checks build the network, which must not be asked for what it cannot do."""
    alone = {line.field for line in facts_alone(asked(), CONVNET).lines}
    assert {"model.encoder", "loss.ibot_weight", "loss.mask_probability"} <= alone
    assert "optim.steps" not in alone and "head.prototypes" not in alone
    for images in SIZES:
        whole = values(derive(asked(), CONVNET, images, True))
        known = values(facts_alone(asked(), CONVNET))
        assert {field: whole[field] for field in known} == known


def test_running_means_of_weights_are_kept_and_the_user_may_say_otherwise() -> None:
    with_means = replace(CONVNET, batch_norm=True)
    assert derive(asked(), with_means, 1000, False).value("train.batch_norm") == "kept"
    assert "train.batch_norm" not in values(derive(asked(), CONVNET, 1000, False))
    yours = derive(asked("train.batch_norm=batch"), with_means, 1000, False)
    assert yours.value("train.batch_norm") == "batch"
