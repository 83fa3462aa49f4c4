"""The look stage: what it reads and refuses, and whole looks."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.load import load
from pipeline.context import Context
from pipeline.errors import ConfigError, PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.foreign import TimmSpec
from pipeline.model.foreign_weights import save_foreign
from pipeline.model.weights import save_backbone
from pipeline.stages import look
from pipeline.storage.run_folder import RunFolder
from pipeline.track.tracker import NullTracker
from pipeline.use.inputs import MOST, spread
from tests.data import noise
from tests.use.made import SPEC, drawn


def photo(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, *size[::-1])).save(path)
    return path


def mask(path: Path, size: tuple[int, int] = (40, 30), white: int = 15) -> Path:
    values = np.zeros(size[::-1], np.uint8)
    values[:white] = 255
    Image.fromarray(values).save(path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(drawn(), SPEC, tmp_path_factory.mktemp("weights") / "dinov2")


def context(tmp_path: Path, *arguments: str) -> Context:
    always = (f"run.folder={tmp_path / 'runs'}", "run.name=look", "train.device=cpu")
    config = load([*always, *arguments])
    return Context(config, RunFolder.of(config.run.folder, "look"), only=True)


def test_files_and_folders_in_order_and_what_is_left_out(tmp_path: Path, weights: Path) -> None:
    first = photo(tmp_path / "z.png")
    for number in range(2):
        photo(tmp_path / "more" / f"{number}.jpg", seed=number)
    (tmp_path / "more" / "broken.png").write_bytes(b"nothing")
    (tmp_path / "more" / "README.md").write_text("words")
    asked = look.asked(
        context(
            tmp_path, f"look.images={json.dumps([str(first), str(tmp_path / 'more')])}",
            f"look.model={weights}",
        )
    )  # fmt: skip
    assert [file.name for file in asked.images] == ["z.png", "0.jpg", "1.jpg"]
    pixels = asked.decode(asked.images[0].content)
    assert np.array_equal(pixels, np.asarray(Image.open(first)))
    assert len(asked.left_out) == 1 and asked.left_out[0].startswith("broken.png is not read")


def test_the_key_changes_with_what_matters(tmp_path: Path, weights: Path) -> None:
    path = photo(tmp_path / "a.png")
    arguments = [f"look.images={path}", f"look.model={weights}"]
    first = look.key(context(tmp_path, *arguments))
    assert look.key(context(tmp_path, *arguments, "look.enabled=true")) == first
    assert look.key(context(tmp_path, *arguments, "look.block=0")) != first
    photo(path, seed=5)
    assert look.key(context(tmp_path, *arguments)) != first


SENTENCES: dict[str, tuple[list[str], str]] = {
    "no model": (["images={a}"], "no model to look with"),
    "no images": (["model={weights}"], "nothing to look at: look.images is empty"),
    "no such image": (["model={weights}", "images=gone.jpg"], "look.images: there is no gone.jpg"),
    "not an image": (
        ["model={weights}", "images={text}"],
        "look.images: words.jpg is not read: not_an_image",
    ),
    "a folder without images": (["model={weights}", "images={empty}"], "has a name of an image"),
    "too many": (["model={weights}", "images={many}"], f"at most {MOST} are looked at"),
    "vectors only": (["model=descriptor", "images={a}"], "gives vectors only"),
    "another size": (
        ["model={weights}", "images={a}", "reference={a}", "mask={small}"],
        "small.png has 20 x 10 pixels, its reference a.png 40 x 30",
    ),
    "an empty mask": (
        ["model={weights}", "images={a}", "reference={a}", "mask={black}"],
        "black.png is empty",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_sentences(case: str, tmp_path: Path, weights: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.jpg").write_text("words")
    places: dict[str, Any] = {
        "a": photo(tmp_path / "a.png"),
        "text": tmp_path / "words.jpg",
        "empty": tmp_path / "empty",
        "many": tmp_path / "many",
        "small": mask(tmp_path / "small.png", (20, 10), white=5),
        "black": mask(tmp_path / "black.png", white=0),
        "weights": weights,
    }
    for number in range(MOST + 1 if case == "too many" else 0):
        photo(tmp_path / "many" / f"{number}.png", (8, 8))
    arguments, what = SENTENCES[case]
    fields = [f"look.{one.format(**places)}" for one in arguments]
    with pytest.raises(PipelineError, match=what) as error:
        look.asked(context(tmp_path, *fields))
    assert error.value.hint


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ("look.mark=12", "expected x,y in pixels"),
        ("look.mark=-1,5", "expected x,y in pixels"),
        ("look.reference=a.png", "give one mask for each reference"),
        ("look.classes.road=3", "there is no mask"),
        ("look.void=300", "look.void"),
        ("look.method=mode", "look.method"),
        ("look.images=[s3://key:word@bucket/a.jpg]", "what may be a key or password"),
    ],
)
def test_fields(argument: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load([argument])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["look.mark=9999,0"], "pixel 9999,0 of an image of 40 x 30 pixels"),
        (["look.block=3"], "block 3 of a network with 3 blocks"),
        (["look.image_size=20000"], r"a.png of 40 x 30 pixels becomes 3,810 x 2,857 patches"),
        (["look.images={thin}"], r"thin.png of 3000 x 2 pixels becomes 6,000 x 4 patches"),
    ],
)
def test_a_dry_run_refuses_what_a_look_cannot_do(
    arguments: list[str], what: str, tmp_path: Path, weights: Path
) -> None:
    places = {"a": photo(tmp_path / "a.png"), "thin": photo(tmp_path / "thin.png", (3000, 2))}
    fields = [one.format(**places) for one in ["look.images={a}", *arguments]]
    asked = context(tmp_path, f"look.model={weights}", *fields)
    for what_it_does in (look.describe, lambda asked: look.run(asked, NullTracker())):
        with pytest.raises(PipelineError, match=what) as error:
            what_it_does(asked)
        assert error.value.hint


def test_any_image_size_becomes_whole_patches(tmp_path: Path, weights: Path) -> None:
    """30 of 40 x 30 pixels with patches of 7: 6 x 4 patches."""
    asked = context(
        tmp_path, f"look.images={photo(tmp_path / 'a.png')}", f"look.model={weights}",
        "look.image_size=30",
    )  # fmt: skip
    request = look.asked(asked)
    seen = look._see(request, asked.config)
    assert seen.attention[0].shape[1:] == (4, 6)
    assert look.describe(asked).startswith("1 image by")


def test_a_few_of_a_set_are_spread_over_it(tmp_path: Path) -> None:
    from pipeline.shards.shards import open_shards
    from tests.stages.shards import write_shards

    shards = open_shards(str(write_shards(tmp_path / "shards", images=23, group=5)))
    files = spread(shards, 4)
    assert [file.content for file in files] == [b"image %d" % row for row in (2, 8, 14, 20)]
    assert len(spread(shards, 99)) == 23


def test_images_of_a_set_are_called_as_they_were_packed(tmp_path: Path) -> None:
    from pipeline.shards.columns import image_id
    from pipeline.shards.shards import open_shards
    from tests.serve.made import write_shard

    images = [b"image %d" % row for row in range(20)]
    sources = [f"photos/{row:02}.jpg" if row else "" for row in range(20)]
    write_shard(tmp_path / "shard.parquet", images, sources, [1] * 20, rows_per_group=6)
    first, *others = spread(open_shards(str(tmp_path / "shard.parquet")), 20)
    assert first.name == f"square {image_id(images[0])[:8]}"  # class and id, where no path is known
    assert [file.name for file in others] == sources[1:]
    assert [file.content for file in others] == images[1:]


def test_the_command_line(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Files stand for themselves, short names for fields; a dry run writes nothing."""
    first, folder = photo(tmp_path / "a b=c.png"), photo(tmp_path / "more" / "1.jpg").parent
    arguments = [str(first), str(folder), f"model={weights}", "mark=1,2", "--dry-run"]
    job = Path(__file__).parents[2] / "jobs" / "look.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(job), *arguments])
    runpy.run_path(str(job), run_name="__main__")
    said = "".join(capfd.readouterr())
    assert f"2 images by {weights}" in said and "nothing is written" in said
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr("sys.argv", [str(job), *arguments, "mask=gone.png"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(job), run_name="__main__")
    assert "give one mask for each reference" in capfd.readouterr().err


def test_a_whole_look(tmp_path: Path, weights: Path) -> None:
    a, b = photo(tmp_path / "a.png"), photo(tmp_path / "b.png", (30, 60), seed=1)
    known = mask(tmp_path / "m.png")
    asked = context(
        tmp_path, f"look.images={json.dumps([str(a), str(b)])}", f"look.model={weights}",
        f"look.reference={a}", f"look.mask={known}", "look.mark=3,4",
        f"look.out={tmp_path / 'out'}",
    )  # fmt: skip
    result = look.run(asked, NullTracker())
    out = tmp_path / "out"
    assert look.intact(asked) and (out / "look.html").is_file()
    assert sorted(path.name for path in out.glob("*.png")) == sorted(result["files"])
    assert "2 images by" in result["text"] and "masks of around, object" in result["text"]
    segmented = np.asarray(Image.open(io.BytesIO((out / "02-b-mask.png").read_bytes())))
    assert segmented.shape == (60, 30) and set(np.unique(segmented)) <= {0, 255}
    (out / "look.html").unlink()
    assert not look.intact(asked)


def test_a_network_without_patches_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs timm")
    convnet = TimmSpec("test_resnet", image_size=32).build()
    folder = save_foreign(
        convnet, tmp_path / "convnet", Preprocessing(None, (0.5,) * 3, (0.5,) * 3)
    )
    asked = context(tmp_path, f"look.images={photo(tmp_path / 'a.png')}", f"look.model={folder}")
    with pytest.raises(PipelineError) as error:
        look.run(asked, NullTracker())
    assert error.value.what == "the network gives no patches, only one vector an image"
    assert "use a vision transformer" in error.value.hint
