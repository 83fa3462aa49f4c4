"""Recipe files and `a.b=value`, against YAML mappings that say the same, and the sentences."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.config import Config
from pipeline.config.load import describe, field_paths, load, read_recipe
from pipeline.errors import ConfigError

FIELDS = dict(field_paths())
# A second valid value of fields of each kind, as one types it.
TYPED = {
    "run.name": "other",
    "run.seed": "7",
    "data.source": "s3://bucket/photos",
    "data.label_column": "folder",
    "data.max_bad_fraction": "0.5",
    "augment.global_scale": "[0.25, 1]",
    "augment.mean": "[0.5,0.5,0.5]",
    "augment.blur": "released",
    "model.width": "192",
    "model.drop_path": "0",
    "ibot_head.separate": "true",
    "optim.lr": "1e-3",
    "optim.steps": "20",
    "optim.betas": "[0.9,0.95]",
    "train.workers": "auto",
    "train.compile": "false",
    "evaluate.during_training": "null",
    "track.enabled": "no",
}


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(arguments)
    assert caught.value.hint
    return caught.value.what.splitlines()


@settings(max_examples=40)
@given(st.lists(st.sampled_from(sorted(TYPED)), min_size=1, unique=True))
def test_overrides_say_what_a_mapping_says(names: list[str]) -> None:
    mapping: dict[str, dict[str, object]] = {}
    for name in names:
        section, leaf = name.split(".")
        mapping.setdefault(section, {})[leaf] = yaml.safe_load(TYPED[name])
    assert load([f"{name}={TYPED[name]}" for name in names]) == Config.model_validate(mapping)


def test_an_override_wins_over_the_recipe_and_the_last_one_over_the_first(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim: {lr: 1.0e-4, steps: 5}\n")
    config = load(["optim.lr=2e-4", str(recipe), "optim.lr=3e-4"])
    assert (config.optim.lr, config.optim.steps) == (3e-4, 5)


def test_a_run_is_called_after_its_recipe_unless_it_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("optim: {steps: 5}\n")
    (tmp_path / "named.yaml").write_text("run: {name: first}\n")
    assert load([str(tmp_path / "mine.yaml")]).run.name == "mine"
    assert load([str(tmp_path / "named.yaml")]).run.name == "first"
    assert load([str(tmp_path / "named.yaml"), "run.name=second"]).run.name == "second"
    assert load([]).run.name == ""


def test_text_stays_text() -> None:
    for text in ("2026", "1e-3", "no", "007", "none"):
        assert load([f"run.name={text}", f"data.source={text}"]).data.source == text


def test_text_may_hold_equals_signs_and_colons() -> None:
    uri = "s3://bucket/a?region=eu:west&scheme=http"
    assert load([f"data.source={uri}"]).data.source == uri


def test_empty_means_empty_text() -> None:
    assert load(["evaluate.queries="]).evaluate.queries == ""


MISTAKES = [
    ("optim.lrr=1", "optim.lrr: no such field; did you mean optim.lr?"),
    ("optm.lr=1", "optm: no such field; did you mean optim?"),
    ("train.lr=1", "train.lr: no such field; did you mean"),
    ("wholly.different=1", "wholly: no such field"),
    ("optim.steps=ten", "optim.steps: Input should be a valid integer"),
    ("optim.steps=1.5", "optim.steps: Input should be a valid integer"),
    ("optim.lr=fast", "optim.lr: Input should be a valid number"),
    ("track.enabled=perhaps", "track.enabled: Input should be a valid boolean"),
    ("optim.betas=0.9", "optim.betas: Input should be a valid tuple"),
    ("augment.mean=[0.5,x]", "augment.mean: Input should be a valid number"),
    ("objective=dinov3", "objective: Input should be 'dinov2' or 'dino'"),
    ("train.workers=0", "train.workers: Input should be greater than 0"),
    ("data.max_bad_fraction=2", "data.max_bad_fraction: Input should be less than or equal"),
    ("model.size=huge", "model.size: Input should be 'vits', 'vitb', 'vitl' or 'vitg'"),
    ("optim={lr:1}", "optim: give its fields one by one, e.g. optim.<field>=value"),
    ("optim=5", "optim: is a section, give its fields as optim.<field>=value"),
    ("run.seed.x=5", "run.seed: "),
    (
        "data=images data.max_bad_fraction=.1",
        "data: is a section, give its fields as data.<field>=value",
    ),
    ("head.norm=batch head.layers=1", "head: norm=batch puts BatchNorm after each hidden layer"),
    (
        "train.tune=heads model.init=x distill.teacher=y distill.loss=cosine",
        "train.tune=heads freezes the backbone, and distill.loss=cosine may learn features",
    ),
]


def test_one_mistake_is_one_sentence() -> None:
    for argument, sentence in MISTAKES:
        lines = problems(*argument.split(" "))
        assert len(lines) == 1, f"{argument}: {lines}"
        assert lines[0].startswith(sentence), f"{argument}: {lines}"


def test_the_value_that_was_found_is_shown() -> None:
    assert "(got 'ten')" in problems("optim.steps=ten")[0]
    assert "1.5" in problems("data.max_bad_fraction=1.5")[0]


def test_a_right_name_in_the_wrong_section_is_found() -> None:
    assert problems("track.prototypes=5")[0].endswith("did you mean head.prototypes?")


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("optim: {lrr: 1}\nmodel: {size: huge}\n")
    sentences = problems(str(recipe), "data={a:1}", "optim.steps=ten", "augment.flip=2", "x=1")
    assert sorted(line.partition(":")[0] for line in sentences) == [
        "augment.flip",
        "data",
        "model.size",
        "optim.lrr",
        "optim.steps",
        "x",
    ]


def test_a_slip_in_any_field_is_recognised() -> None:
    assert not [line for path in FIELDS if (line := badly_recognised(path))]


def badly_recognised(path: str) -> str:
    """What is said of a slip in a field, where that leads to another field that is less near."""
    section, _, leaf = path.rpartition(".")
    if len(leaf) < 3:
        return ""
    slip = f"{section}.{leaf[:-2]}{leaf[-1]}{leaf[-2]}".lstrip(".")  # the last two letters swapped
    if slip == path:
        slip = path[:-1]
    if slip in FIELDS:
        return ""
    (line,) = problems(f"{slip}=1")
    suggested = line.partition("did you mean ")[2].rstrip("?")
    # another field may be just as near
    nearness = [difflib.SequenceMatcher(None, slip, x).ratio() for x in (suggested, path)]
    return "" if suggested == path or nearness[0] >= nearness[1] else line


def test_two_recipes_are_one_too_many(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("")
    assert "more than one recipe" in problems(str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"))[0]


def test_a_missing_recipe_is_named_with_its_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cifar10.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(["configs/cifar_10.yaml"])
    assert caught.value.what.startswith("no recipe at configs/cifar_10.yaml")
    assert caught.value.hint == "did you mean configs/cifar10.yaml?"
    with pytest.raises(ConfigError) as caught:
        load(["optim.lr"])
    assert "an override is written a.b=value" in caught.value.what
    assert caught.value.hint == "recipes are in configs/*.yaml"
    (tmp_path / "photos.yaml").write_text("")
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError) as caught:
        load(["foto.yaml"])
    assert caught.value.hint == "did you mean photos.yaml?"
    with pytest.raises(ConfigError) as caught:
        load(["photos"])
    assert "python jobs/start.py photos writes a recipe" in caught.value.hint


NO_MAPPINGS = [
    ("optim:\n  lr: [1, 2\n", "is not YAML at line 3"),
    ("optim:\n\tlr: 1\n", "is not YAML at line 2"),
    ("- optim\n- lr\n", "holds a list, expected `section:` mappings"),
    ("just a word\n", "holds a str, expected `section:` mappings"),
    ("a: !!python/object/apply:os.getcwd []\n", "is not YAML at line 1"),
]


def test_a_recipe_that_is_no_mapping(tmp_path: Path) -> None:
    recipe = tmp_path / "broken.yaml"
    for text, sentence in NO_MAPPINGS:
        recipe.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load([str(recipe)])
        assert f"{recipe} {sentence}" in caught.value.what


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="is not YAML"):
        load([str(recipe)])


def test_an_empty_recipe_and_an_empty_section_are_the_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "empty.yaml"
    recipe.write_text("# nothing\n")
    assert read_recipe(str(recipe)) == {}
    recipe.write_text("optim:\n  # lr: 1\nmodel:\n")
    assert load([str(recipe)]).optim == Config().optim
    assert load([str(recipe), "optim.lr=1"]).optim.lr == 1


def test_help_lists_every_field_with_default_and_meaning() -> None:
    text = describe()
    section, listed = "", {}
    for line in text.splitlines():
        if line and not line.startswith(" "):
            section = line
        elif line:
            name, _, meaning = line.strip().partition(" ")
            listed[f"{section}.{name}".lstrip(".")] = meaning
    assert list(listed) == list(FIELDS)
    for path, field in FIELDS.items():
        assert str(field.description) in listed[path]
    assert listed["optim.lr"].endswith("[0.002]")
    assert listed["augment.global_scale"].endswith("[[0.32, 1.0]]")
    assert "[" not in listed["data.source"]


def test_fields_that_are_set_beside_a_switched_off_curation_are_still_refused() -> None:
    with pytest.raises(ConfigError, match=r"dedup would be ignored"):
        load(["configs/demo.yaml", "curate.preset=", "dedup.threshold=0.5"])
