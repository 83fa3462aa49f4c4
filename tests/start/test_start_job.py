"""jobs/start.py: what it sees in a folder, which recipe it takes, and that the recipe loads."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import job
from pipeline.commands.table import COMMANDS
from pipeline.config.load import load
from pipeline.doctor import fits
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_huggingface
from pipeline.plan.plan import SetFacts, resolve
from pipeline.plan.resume import value_at
from pipeline.stages.checks.micro_batches import GPU_ROOM
from pipeline.start import folder as images
from pipeline.start import machine, weights
from pipeline.start.choose import FOR_A_VIT, choose
from pipeline.start.fitted import fitted, unused
from pipeline.start.machine import GB, Surroundings
from pipeline.start.memory import planned
from pipeline.start.written import MARK, place_of, text_of, write
from pipeline.train import estimate
from tests.start.starting import config, here, picture, pile, ran


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """120 images in two folders, a README, a hidden file and a broken picture."""
    home = tmp_path / "My photos.v2"
    for number in range(120):
        picture(home / ("cat", "dog")[number % 2] / f"{number}.png", 100, number)
    (home / "README.md").write_text("notes")
    (home / "cat" / ".DS_Store").write_bytes(b"x")
    return home


@pytest.mark.long
def test_the_written_recipe_loads_says_why_and_dry_runs(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ran(str(photos))
    shown = capsys.readouterr().out
    assert "120 images" in shown and "2 classes: cat, dog" in shown
    assert re.search(r"left alone +2 other files: .*README.md", shown)
    path = tmp_path / "My-photos.yaml"
    assert f"python jobs/run.py {path.name} --dry-run" in shown
    text = path.read_text()
    assert text.startswith(MARK)
    for line in text.splitlines():  # each value has its reason
        if re.match(r"  \w+: ", line):
            assert re.search(r"  # \S+", line), line
    recipe = load([str(path)])
    assert recipe.run.name == "My-photos" and recipe.data.source == str(photos)
    assert recipe.optim.global_batch_size == 16  # the largest power of two in a quarter of 120
    job.main(["pack", "pretrain"], "doc", [str(path), f"run.folder={tmp_path}/runs", "--dry-run"])
    assert re.search(r"^time +about", capsys.readouterr().out, re.M)
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_a_dry_start_writes_nothing(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ran(str(photos), "--dry-run")
    shown = capsys.readouterr().out
    assert "would write My-photos.yaml" in shown and "jobs/run.py My-photos" not in shown
    assert re.search(r"^time +about", shown, re.M)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["My photos.v2"]
    (tmp_path / "mine.yaml").write_text("by hand: 1\n")  # what the real start would refuse
    with pytest.raises(SystemExit):
        ran(str(photos), "recipe=mine", "--dry-run")
    assert "mine.yaml is there and was not written by" in capsys.readouterr().err


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "photos.yaml"
    assert write(path, f"{MARK}: one\n") == ""
    assert write(path, f"{MARK}: one\n") == "the same as before"
    assert "photos.yaml.before" in write(path, f"{MARK}: two\n")
    assert (tmp_path / "photos.yaml.before").read_text() == f"{MARK}: one\n"
    assert "photos.yaml.before-2" in write(path, f"{MARK}: three\n")
    assert (tmp_path / "photos.yaml.before").read_text() == f"{MARK}: one\n"
    path.write_text("mine: 1\n")
    with pytest.raises(Exception, match="was not written by jobs/start"):
        write(path, f"{MARK}: four\n")
    assert path.read_text() == "mine: 1\n"


def test_a_place_that_cannot_be_read_or_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photos.yaml"
    write(path, f"{MARK}: one\n")

    def refused(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    for method, words in (
        ("read_text", "photos.yaml cannot be read: Permission denied"),
        ("exists", "photos.yaml cannot be read: Permission denied"),
        ("replace", "photos.yaml cannot be written: Permission denied"),
        ("write_text", "photos.yaml cannot be written: Permission denied"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(Path, method, refused)
            with pytest.raises(StorageError, match=words):
                write(path, f"{MARK}: two\n")
        # whatever failed, the earlier recipe is where it was
        assert [x.name for x in tmp_path.iterdir()] == ["photos.yaml"], method
        assert path.read_text() == f"{MARK}: one\n"


def test_names_with_a_line_break_stay_in_their_comment() -> None:
    choice = choose(config(), pile(150), here())
    text = text_of(choice, ["images: a\nrun: {name: b}"])
    assert "# images: a run: {name: b}\n" in text and "run" not in yaml.safe_load(text)


def test_names_of_recipes() -> None:
    for source, name in (
        ("photos/", "photos.yaml"),
        ("/data/My photos.v2", "My-photos.yaml"),
        ("s3://bucket/set*", "set.yaml"),
        ("builtin:photos", "photos.yaml"),
        ("../a,b", "a.yaml"),
    ):
        assert place_of(load([f"data.source={source}"])) == Path(name), source
    assert place_of(load(["data.source=a", "start.recipe=deep/b"])) == Path("deep/b.yaml")


def test_what_a_folder_holds(tmp_path: Path) -> None:
    for split, number in (("Train", 12), ("val", 4), ("test", 4)):
        for i in range(number):
            picture(tmp_path / split / f"k{i % 2}" / f"{i}.png", 40, i)
    found = images.look(load([f"data.source={tmp_path}"]))
    assert found.source == f"{tmp_path}/Train" and found.queries == f"{tmp_path}/val"
    assert found.classes == ("k0", "k1") and found.images == 12 and found.side == 40
    assert found.formats == {"PNG": 12}
    for number in range(8):  # by date: folders, but no classes
        picture(tmp_path / "dates" / f"2024-0{1 + number % 2}" / f"{number}.png", 40, number)
        picture(tmp_path / "each" / f"k{number}" / "a.png", 40, number)
    assert "dates" in images.look(load([f"data.source={tmp_path}/dates"])).no_classes
    assert "1.0 images each" in images.look(load([f"data.source={tmp_path}/each"])).no_classes
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match="none of 1 that were tried"):
        images.look(load([f"data.source={tmp_path}/broken"]))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("nothing")
    with pytest.raises(DataError, match=r"no image in .*notes, but 1 other files such as README"):
        images.look(load([f"data.source={tmp_path}/notes"]))
    table = pa.table({"image": [(tmp_path / "val/k0/0.png").read_bytes()] * 3, "label": [0, 1, 0]})
    pq.write_table(table, tmp_path / "hub.parquet")
    found = images.look(load([f"data.source={tmp_path}/hub.parquet"]))
    assert found.images == 3 and found.labelled and found.side == 40


def test_a_class_that_is_called_train_is_no_training_set(tmp_path: Path) -> None:
    for name in ("train", "bus", "car"):
        for number in range(6):
            picture(tmp_path / name / f"{number}.png", 32, number)
    looked_at = images.look(config(f"data.source={tmp_path}"))
    assert looked_at.source == str(tmp_path) and looked_at.images == 18
    assert looked_at.classes == ("bus", "car", "train") and looked_at.queries == ""


def test_which_recipe() -> None:
    for number, around, fields, name in (
        (577, here(), [], "small"),
        (577, here(gb=24), [], "small"),
        (FOR_A_VIT, here(gb=24), [], "vits14"),
        (FOR_A_VIT, here(gb=24), ["train.device=cpu"], "small"),
        (40, here(), ["model.init=weights.pth"], "adapt"),
        (0, here(), [], "small"),
    ):
        choice = choose(config(*fields), pile(number), around)
        assert choice.name == name, (number, fields)
    with pytest.raises(DataError, match="too few for anything but adaptation"):
        choose(config(), pile(99), here(gb=80))
    tiny = choose(config(), pile(50_000, side=32), here(gb=80))
    assert tiny.name == "small" and tiny.config.augment.global_size == 32
    assert choose(config(), pile(3_000), here()).config.curate.preset == "dedup"


def test_what_the_user_sets_stays() -> None:
    fields = ["optim.lr=0.0123", "optim.passes=7", "head.prototypes=333", "train.accumulation=8"]
    choice = fitted(choose(config(*fields), pile(20_000), here(gb=24)), pile(20_000), here(gb=24))
    for field in fields:
        name, _, value = field.partition("=")
        assert value_at(choice.choice.config, name) == float(value), name
    reasons = {one.field: one.reason for one in choice.choice.recipe.lines}
    assert reasons["optim.lr"] == "as you set it"


@pytest.mark.long
@pytest.mark.parametrize("gb", [8, 24, 48, 80])
def test_a_step_fits_the_gpu_and_twice_the_images_would_not(gb: int) -> None:
    folder, around = pile(1_281_167), here(cpus=8, gb=gb)
    made = fitted(choose(config(), folder, around), folder, around)
    recipe = made.choice.config
    plan, built = planned(recipe, around.machine, folder.images)
    memory = estimate.estimated_cost(plan, built).memory
    assert plan.device == "cuda" and plan.micro_batch * plan.accumulation == 1024
    assert memory.total <= GPU_ROOM * gb * GB
    assert plan.micro_batch >= 32
    if plan.micro_batch < 1024:
        twice = memory.of(2 * plan.micro_batch, plan.accumulation // 2).total
        assert twice > GPU_ROOM * gb * GB
    assert resolve(recipe, SetFacts(folder.images, ""), around.machine).lr == 2e-3


@pytest.mark.long
def test_a_long_training_is_shortened_to_the_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.train.speed.lasts.peak_flops", lambda *_: 1e11)
    around = here()
    around = Surroundings(**{**around.__dict__, "here": True})
    folder = pile(50_000)
    for asked, hours in (([], 8.0), (["start.hours=2"], 2.0)):
        made = fitted(choose(config(*asked), folder, around), folder, around)
        assert made.seconds == pytest.approx(3600 * hours, rel=0.05)
        reasons = {one.field: one.reason for one in made.choice.recipe.lines}
        assert f"about {hours:g} hours" in reasons["optim.passes"]
    whole = fitted(choose(config("optim.passes=200"), folder, around), folder, around)
    assert whole.seconds > 9 * 3600  # who says how long it is, is believed


def test_weights_in_caches_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.at_hand() == []
    hub = tmp_path / ".cache" / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "dinov2_vits14_pretrain.pth").touch()
    (hub / "resnet50.pth").touch()
    snapshot = tmp_path / ".cache/huggingface/hub/models--timm--vit_small/snapshots/abc"
    snapshot.mkdir(parents=True)
    assert weights.at_hand() == [str(hub / "dinov2_vits14_pretrain.pth")]
    (snapshot / "model.safetensors").touch()
    assert weights.at_hand()[1:] == [str(snapshot)]


def test_a_gpu_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = machine.look(config("start.gpu_gb=24"))
    assert found.gpu_bytes == 24e9 and found.machine.gpus == 1 and not found.here
    line = found.line()
    assert "22 GiB" in line and "8 CPUs (a guess" in line
    assert "disk" not in line and "of memory" not in line  # those of this machine
    told = machine.look(config("start.gpu_gb=24", "resources.cpus=32"))
    assert told.machine.cpus == 32 and "32 CPUs, 1 GPU" in told.line()
    with pytest.raises(ConfigError, match=r"start.gpu_gb=24 asks for a GPU, and train.device=cpu"):
        machine.look(config("start.gpu_gb=24", "train.device=cpu"))


@pytest.mark.long
def test_a_dry_start_for_another_machine_plans_for_it(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ran(str(photos), "gpu_gb=24", "--dry-run")
    shown = capsys.readouterr().out
    assert re.search(r"^workers .* cuda, bfloat16", shown, re.M)
    assert re.search(r"^time +not known: a machine with a GPU of 24 GB", shown, re.M)
    assert re.search(r"^machine .*24 GB.*disks of this machine$", shown, re.M)
    assert not re.search(r"^machine +this machine", shown, re.M)
    # what the user sets is held against the memory that was asked for
    ran(str(photos), "gpu_gb=0.7", "train.accumulation=1", "optim.global_batch_size=96")
    assert re.search(r"a GPU has 0\.7 GiB", "".join(capsys.readouterr()))


def test_memory_and_time_of_a_machine_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = machine.look(config("start.gpu_gb=24")).machine
    plan, built = planned(choose(config(), pile(20_000), here(gb=24)).config, other, 20_000)
    cost = estimate.estimated_cost(plan, built)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # a smaller one is here
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: pytest.fail("was asked"))
    monkeypatch.setattr("pipeline.doctor.fits.seconds_of", lambda *_: pytest.fail("was timed"))
    assert fits.memory_of(plan, cost, other) == (cost.memory_bytes, 24e9)
    with caplog.at_level("INFO", "pipeline"):
        fits.say_time(plan, cost, other)
    assert "24 GB (start.gpu_gb) is not here" in caplog.text


@pytest.mark.parametrize(
    ("number", "fields", "said"),
    [
        (150, ["start.hours=2"], []),
        (150, [], []),
        (150, ["start.hours=2", "optim.passes=5"], ["start.hours=2: optim.passes sets"]),
        (150, ["start.hours=2", "model.init=w.pth"], ["start.hours=2: an adaptation takes"]),
        (150, ["start.gpu_gb=24", "model.init=w.pth"], ["start.gpu_gb=24: an adaptation fits"]),
        (
            0,
            ["start.hours=2", "start.gpu_gb=24"],
            ["start.hours=2: only packing shows", "start.gpu_gb=24: a batch is fitted"],
        ),
        (
            150,
            ["start.hours=2", "start.gpu_gb=24", "train.accumulation=2"],
            ["start.hours=2 for the training", "start.gpu_gb=24 for the batch"],
        ),
    ],
)
def test_a_field_of_start_that_is_not_used_is_named(
    number: int, fields: list[str], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("pipeline.train.speed.lasts.peak_flops", lambda *_: 1e11)
    asked = config(*fields, "train.device=auto")
    around = machine.look(asked)
    if around.here:
        around = replace(here(), here=True)
    recipe = fitted(choose(asked, pile(number), around), pile(number), around)
    sentences = unused(recipe, around)
    assert len(sentences) == len(said)
    for sentence, begin in zip(sentences, said, strict=True):
        assert sentence.startswith(begin)


def test_the_call_from_python(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import api

    monkeypatch.chdir(tmp_path)
    started = api.start(photos, settings={"optim.passes": 3})
    assert started.choice == "small" and started.recipe == Path("My-photos.yaml")
    assert yaml.safe_load(started.recipe.read_text())["optim"]["passes"] == 3
    assert started.reasons["optim.passes"] == "as you set it"
    assert started.source == yaml.safe_load(started.recipe.read_text())["data"]["source"]


@pytest.mark.long
def test_weights_make_an_adaptation(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = BackboneSpec(image_size=28, patch_size=7, width=32, depth=2, heads=2)
    held = save_huggingface(
        spec.build(), spec, tmp_path / "held", Preprocessing(28, (0.5,) * 3, (0.2,) * 3)
    )
    ran(str(photos), str(held), "recipe=adapted")
    assert "adapt: you name weights" in capsys.readouterr().out
    recipe = load([str(tmp_path / "adapted.yaml")])
    assert recipe.adapt.enabled and recipe.model.init == str(held)
    stages = list(COMMANDS["run"].stages)
    job.main(stages, "doc", ["adapted.yaml", f"run.folder={tmp_path}/runs", "--dry-run"])
    shown = capsys.readouterr().out
    assert "a ViT 32 x 2, patches of 7" in shown and re.search(r"^time +about", shown, re.M)
    ran(str(photos), str(held), "recipe=other", "gpu_gb=24", "hours=2", "--dry-run")
    shown = capsys.readouterr().out
    assert re.search(r"^not used +start.hours=2: an adaptation", shown, re.M)
    assert re.search(r"^not used +start.gpu_gb=24: an adaptation", shown, re.M)
    assert re.search(r"^workers .* cuda", shown, re.M)
    ran(str(photos), str(held), "recipe=other", "hours=2")
    assert "# not used: start.hours=2: an adaptation" in (tmp_path / "other.yaml").read_text()
    monkeypatch.setattr(images, "SAMPLE", 2)
    for path in sorted(photos.rglob("*.png"))[20:]:
        path.unlink()
    with pytest.raises(SystemExit):
        ran(str(photos), "recipe=few")
    assert "too few for anything but adaptation" in capsys.readouterr().err
    ran(str(photos), str(held), "recipe=few")  # with weights they are enough
    assert (tmp_path / "few.yaml").is_file()
