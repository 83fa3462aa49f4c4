"""The models themselves: bounds, cross-field sentences, frozen, documented; recipes that load."""

from __future__ import annotations

import math
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from pipeline.config.config import Config
from pipeline.config.load import field_paths, load
from pipeline.config.sizes import SIZES
from pipeline.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
FIELDS = dict(field_paths())
# Where any finite number is right: normalisation subtracts it.
UNBOUNDED = {"augment.mean", "search.min_similarity"}


def nested(path: str, value: object) -> dict[str, typing.Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return typing.cast("dict[str, typing.Any]", value)


def refused(path: str, value: object) -> bool:
    try:
        Config.model_validate(nested(path, value))
    except ValidationError:
        return True
    return False


def kinds(annotation: object) -> set[object]:
    """The scalar types in an annotation: `tuple[Fraction, Fraction] | None` gives float, None."""
    if arguments := typing.get_args(annotation):
        return set().union(*(kinds(a) for a in arguments if not isinstance(a, str)))
    return {annotation}


NUMBERS = [p for p, f in FIELDS.items() if kinds(f.annotation) & {int, float}]


def test_models_that_are_named_say_themselves_which_sizes_they_take() -> None:
    config = load(["evaluate.models=[timm:resnet10t]", "evaluate.image_size=50"])
    assert config.evaluate.image_size == 50


def test_the_default_is_a_valid_config() -> None:
    assert Config() == Config.model_validate(Config().model_dump(mode="json"))


def test_fields_are_found_by_an_independent_walk() -> None:
    flat = {
        f"{section}.{name}" if isinstance(values, dict) else section
        for section, values in Config().model_dump().items()
        for name in (values if isinstance(values, dict) else [""])
    }
    assert set(FIELDS) == flat


def test_every_field_has_a_line_of_documentation() -> None:
    texts = {path: field.description or "" for path, field in FIELDS.items()}
    assert not [path for path, text in texts.items() if not text]
    assert not [path for path, text in texts.items() if "\n" in text or len(text) >= 140]


def test_every_number_has_a_bound_and_is_finite() -> None:
    taken = []
    for path in NUMBERS:
        default = FIELDS[path].default
        count = len(default) if isinstance(default, tuple) else 0
        for number in (math.nan, math.inf, *([] if path in UNBOUNDED else [-1])):
            if not refused(path, [number] * count if count else number):
                taken.append(f"{path} takes {number}")
    assert not taken, "\n".join(taken)


def test_values_never_change() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.optim = config.optim  # type: ignore[misc]


def test_every_section_is_strict_and_documented() -> None:
    for section in (Config, *(type(x) for _, x in Config() if isinstance(x, BaseModel))):
        assert section.model_config["extra"] == "forbid", section
        assert section.model_config["frozen"] is True, section
        assert (section.__doc__ or "").strip(), section


APART = [
    (["augment.global_scale=[0.9,0.2]"], "augment: global_scale must be two areas"),
    (["augment.local_scale=[0,0.2]"], "augment: local_scale must be two areas 0 < low"),
    (["augment.std=[1,0,1]"], "augment: std must be positive"),
    (["model.width=100"], "model: width 100 is not a multiple of heads 6"),
    (["loss.dino_weight=0", "loss.ibot_weight=0"], "nothing would be learnt"),
    (["augment.mean=[0.5,0.5]"], "augment.mean has 2 numbers, but model.in_channels=3"),
    (["model.in_channels=1"], "augment.mean has 3 numbers, but model.in_channels=1"),
    (["objective=dino", "loss.ibot_weight=1"], "objective=dino has no iBOT"),
    (["objective=dino", "loss.mask_probability=0.5"], "objective=dino hides nothing"),
    (["objective=dino", "distill.teacher=runs/x"], "objective=dino is our own objective"),
    (["distill.teacher=x", "loss.mask_probability=0.5"], "distillation hides nothing"),
    (
        ["distill.teacher=x", "distill.objective=true", "loss.mask_probability=0"],
        "loss.ibot_weight is not 0 but loss.mask_probability is",
    ),
    (["distill.loss=cosine"], "distill.teacher is empty, so distill.loss would do nothing"),
    (
        ["distill.cls_weight=2", "distill.objective=true"],
        "distill.teacher is empty, so distill.cls_weight, distill.objective would do nothing",
    ),
    (
        ["distill.teacher=x", "distill.loss=targets", "distill.objective=true"],
        "distill.loss=targets trains the heads for the teacher's prototypes",
    ),
    (
        ["distill.teacher=x", "distill.loss=targets", "distill.patch_weight=2"],
        "distill.loss=targets learns no features, so distill.patch_weight would do nothing",
    ),
    (
        ["distill.teacher=x", "distill.cls_weight=0", "distill.patch_weight=0"],
        "distill.cls_weight and distill.patch_weight are both 0",
    ),
    (["loss.mask_ratio=[0.5,0.1]"], "loss: mask_ratio must be low, high"),
    (["loss.mask_probability=0"], "loss.ibot_weight is not 0 but loss.mask_probability is"),
    (["optim.passes=2", "optim.steps=10"], "optim: give either passes or steps, not both"),
    (
        ["augment.global_size=225"],
        "augment.global_size=225 is not a multiple of model.patch_size=14; the nearest is 224",
    ),
    (["augment.local_size=97"], "augment.local_size=97 is not a multiple"),
    (["evaluate.image_size=50"], "evaluate.image_size=50 is not a multiple"),
    (["curate.preset=balanced"], "does not know how many images to keep; set balance.images"),
    (["curate.preset=lvd142m"], "there is none; set retrieve.seeds.<name>=shards"),
    (["curate.preset=best"], "curate.preset: Input should be '', 'dedup', 'lvd142m'"),
    (["balance.images=5"], "balance would be ignored: curate.preset is empty"),
    (["curate.against=runs/a"], "curate.against would be ignored: curate.preset is empty"),
    (
        ["curate.shards=x", "curate.copy_embedder=a.onnx", "dedup.guard=0.2"],
        "curate.shards, curate.copy_embedder, dedup would be ignored: curate.preset is empty",
    ),
    (
        [
            "curate.preset=dedup",
            "dedup.enabled=false",
            "leaks.scope=components",
            "leaks.sets.a=b",
        ],
        "leaks.scope=components needs the components that dedup finds",
    ),
    (
        ["curate.preset=balanced", "balance.images=5", "balance.levels=[9,9]"],
        "balance: levels must have fewer clusters each, finest first, got [9, 9]",
    ),
    (["curate.preset=dedup", "dedup.threshold=1.5"], "dedup.threshold: "),
]


def refusal(arguments: list[str]) -> str:
    """Why a config is refused; empty where it is taken."""
    try:
        load(arguments)
    except ConfigError as error:
        return error.what
    return ""


def test_fields_that_do_not_go_together() -> None:
    for arguments, sentence in APART:
        said = refusal(arguments)
        assert sentence in said, f"{arguments}: {said!r}"
        assert len(said.splitlines()) == 1, f"{arguments}: {said!r}"


ON = ["curate.preset=dedup"]
SEEDS = [*ON, "retrieve.seeds.a=b"]


UNREAD = [
    (
        [*ON, "balance.floor=2", "balance.levels=[9,3]"],
        "balance.levels, balance.floor",
        "nothing",
    ),
    ([*ON, "retrieve.neighbours=9"], "retrieve.neighbours", "there is no seed set"),
    ([*SEEDS, "retrieve.mode=sample", "retrieve.cap=9"], "retrieve.cap", "mode=sample"),
    ([*SEEDS, "retrieve.mode=cluster", "retrieve.neighbours=9"], "retrieve.neighbours", "mode"),
    ([*SEEDS, "retrieve.mode=sample", "retrieve.sample_above=9"], "retrieve.sample_above", "m"),
    ([*ON, "mix.sample=0.5"], "mix.sample", "nothing is retrieved as neighbours"),
    ([*ON, "mix.as_is=0.5"], "mix.as_is", "no seed images are kept"),
    ([*SEEDS, "mix.pool=0.5"], "mix.pool", "retrieval or balance choose from the pool"),
    ([*ON, "mix.balanced=0"], "mix.balanced", "nothing is balanced"),
    ([*ON, "mix.by=proportion", "mix.pool=0.5"], "mix.by", "there is one part only (pool)"),
    (
        [*SEEDS, "mix.by=proportion", "retrieve.mode=sample", "retrieve.include=false"],
        "mix.by",
        "one part only (sample)",
    ),
    (
        [*SEEDS, "mix.by=proportion", "retrieve.mode=sample", "mix.as_is=0"],
        "mix.by",
        "one part only (sample)",
    ),
    ([*ON, "leaks.threshold=0.5"], "leaks.threshold", "there is no evaluation set"),
    (
        [
            *ON,
            "dedup.threshold=0.8",
            "dedup.false_positives=1e-7",
            "dedup.calibration_images=9",
        ],
        "dedup.false_positives, dedup.calibration_images",
        "set dedup.threshold=auto",
    ),
    ([*ON, "curate.embedder=runs/a"], "curate.embedder", "only retrieval and balance"),
    ([*ON, "curate.image_size=96"], "curate.image_size", "a size of its own"),
]


def test_plans_with_the_old_default_of_the_embedder_are_read() -> None:
    load([*ON, "curate.embedder=descriptor"])
    load(["curate.embedder=descriptor"])


def test_curation_fields_that_nothing_would_read() -> None:
    for arguments, fields, why in UNREAD:
        said = refusal(arguments)
        assert said.startswith(f"{fields} would be ignored: "), f"{arguments}: {said!r}"
        assert why in said, f"{arguments}: {said!r}"
        assert len(said.splitlines()) == 1, f"{arguments}: {said!r}"


def test_all_fields_that_nothing_would_read_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load([*ON, "balance.floor=2", "mix.sample=0.5", "leaks.scope=components"])
    assert [line.split()[0] for line in caught.value.what.splitlines()] == [
        "leaks.scope",
        "balance.floor",
        "mix.sample",
    ]


def test_curation_fields_that_are_read_or_are_defaults() -> None:
    load([*ON, "balance.images=9", "balance.floor=2", "mix.balanced=0.5", "curate.embedder=a.onnx"])
    load(["curate.query=photo.jpg", "curate.against=runs/a", "curate.batch_size=9"])
    load([*ON, "leaks.sets.a=b", "leaks.threshold=0.5", "leaks.scope=components"])
    load([*ON, "evaluate.queries=a", "leaks.threshold=0.5"])
    load([*SEEDS, "retrieve.neighbours=9", "retrieve.clusters=9", "mix.as_is=0.5"])
    load([*ON, "quality.enabled=false", "quality.min_side=9", "dedup.enabled=false"])
    load([*ON, "balance.floor=1", "mix.sample=1", "dedup.threshold=0.8"])  # as they are anyway
    seeds = ["curate.preset=lvd142m", "retrieve.seeds.a=b"]
    load(
        [*seeds, "curate.copy_embedder=sscd.onnx"]
    )  # the preset's leaks.threshold is not the user's
    load([*seeds, "dedup.enabled=false"])  # nor is its leaks.scope, and there is no set to leak
    load([*seeds, "dedup.enabled=false", "leaks.sets.a=b", "leaks.scope=images"])
    config = load([*seeds, "retrieve.mode=sample"])  # nor are its clusters
    assert type(config).model_validate(config.model_dump(mode="json")) == config


def test_weights_of_parts() -> None:
    mixed = [*SEEDS, "mix.as_is=3"]
    with pytest.raises(
        ConfigError, match=r"mix\.as_is=3 is no share: no image is repeated; set mix\.by"
    ):
        load(mixed)
    assert load([*mixed, "mix.by=proportion"]).mix.as_is == 3
    zeros = [f"mix.{part}=0" for part in ("pool", "as_is", "sample", "cluster", "balanced")]
    with pytest.raises(ConfigError, match="nothing would be kept"):
        load([*ON, *zeros])


def test_what_a_preset_means() -> None:
    seeds = ["curate.preset=lvd142m", "retrieve.seeds.landmarks=x"]
    paper = load([*seeds, "curate.copy_embedder=sscd.onnx"])
    assert (paper.dedup.threshold, paper.leaks.threshold) == (0.6, 0.45)
    assert (paper.dedup.chains, paper.leaks.scope) == ("keep", "components")
    retrieve = paper.retrieve
    assert (retrieve.neighbours, retrieve.clusters, retrieve.cluster_images) == (4, 100_000, 10_000)
    assert (retrieve.cluster_seeds, retrieve.cap) == (3, 1_000_000)
    # the paper's thresholds are those of SSCD: other vectors are calibrated, unless the user says
    other = load(seeds)
    assert (other.dedup.threshold, other.leaks.threshold) == ("auto", "auto")
    assert load([*seeds, "dedup.threshold=0.7"]).dedup.threshold == 0.7
    assert load([*seeds, "dedup.chains=split"]).dedup.chains == "split"
    assert load(["curate.preset=dedup"]).dedup == Config().dedup


def test_a_local_size_that_is_not_used_may_be_anything() -> None:
    assert load(["augment.local_crops=0", "augment.local_size=97"]).augment.local_crops == 0


def test_sizes_and_their_overrides() -> None:
    for size, dimensions in SIZES.items():
        assert load([f"model.size={size}"]).model.dimensions == dimensions
        changed = load([f"model.size={size}", "model.depth=3", "model.width=48", "model.heads=2"])
        assert changed.model.dimensions == (48, 3, 2), size


def test_every_recipe_loads() -> None:
    assert RECIPES
    for recipe in RECIPES:
        config = load([str(recipe)])
        assert config.run.name == recipe.stem
        length = config.optim.passes or config.optim.steps or config.adapt.enabled
        assert length, f"{recipe} says no length of its run"
        assert recipe.read_text().startswith("#"), f"{recipe} has no card on top"
