"""The demo set against what its file names say, and against the photographs it is cut from."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.images.decode import BadImage, decode_rgb
from pipeline.pack.demo import tiles as demo
from pipeline.pack.demo.tiles import make_demo
from pipeline.shards.shards import open_shards
from tests.data import packed


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "photos"
    begin = time.process_time()
    report = make_demo(folder)
    assert time.process_time() - begin < 20  # seconds on one core
    return folder, report


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".demo.json"
    }


def box(name: str) -> tuple[int, int, int]:
    side, left, top = (int(part) for part in name.removesuffix(".jpg").split("_")[-3:])
    return left, top, side


def test_counts(demo_set):
    folder, report = demo_set
    contents = files(folder)
    kinds = Counter((name.split("/")[0], name.split("/")[2].split("_")[0]) for name in contents)
    assert kinds == {
        ("train", "tile"): 3456,
        ("train", "near"): 60,
        ("train", "copy"): 12,
        ("train", "leak"): 12,
        ("train", "flat"): 24,
        ("train", "broken"): 10,
        ("test", "tile"): 576,
    }
    assert (report.train, report.test, report.broken) == (3564, 576, 10)
    assert (report.near_duplicates, report.copies, report.leaks, report.flat) == (60, 12, 12, 24)
    assert report.train + report.broken == demo.DEMO_IMAGES
    assert len(report.class_names) == 16
    for part, each in (("train", 216), ("test", 36)):
        tiles = Counter(n.split("/")[1] for n in contents if n.startswith(part) and "/tile_" in n)
        assert tiles == dict.fromkeys(report.class_names, each)


def test_no_pixel_of_a_photograph_is_in_both_parts(demo_set):
    folder, report = demo_set
    painted = defaultdict(lambda: np.zeros((2, 1500, 1500), bool))
    for name in files(folder):
        part, photo, tile = name.split("/")
        if not tile.startswith(("broken", "flat", "leak")):
            left, top, side = box(tile)
            painted[photo][int(part == "test"), top : top + side, left : left + side] = True
    assert set(painted) == set(report.class_names)
    for photo, (train, test) in painted.items():
        assert not (train & test).any(), photo
        assert train.sum() > test.sum() > 0


def test_no_two_training_tiles_show_nearly_the_same(demo_set):
    folder, report = demo_set
    for photo in report.class_names:
        names = [path.name for path in (folder / "train" / photo).glob("tile_*.jpg")]
        boxes = np.array([box(name) for name in names])
        left, top, side = boxes.T
        width = np.minimum.outer(left + side, left + side) - np.maximum.outer(left, left)
        height = np.minimum.outer(top + side, top + side) - np.maximum.outer(top, top)
        both = np.maximum(width, 0) * np.maximum(height, 0)
        shared = both / (np.add.outer(side**2, side**2) - both)
        assert np.triu(shared, 1).max() <= 0.6, photo


def test_tiles_are_what_their_names_say(demo_set):
    folder, _ = demo_set
    spec = importlib.util.find_spec("skimage")
    with Image.open(Path(spec.origin).parent / "data" / "chelsea.png") as image:
        photo = np.asarray(image.convert("RGB"))
    checked = 0
    for path in (folder / "train" / "cat").glob("tile_96_*.jpg"):  # this scale is not resized
        left, top, side = box(path.name)
        want = photo[top : top + side, left : left + side]
        assert np.abs(decode_rgb(path.read_bytes()).astype(int) - want).mean() < 6
        checked += 1
    assert checked > 40
    assert Image.open(next((folder / "train" / "brick").glob("tile_*.jpg"))).mode == "L"


def test_test_tiles_have_the_colours_of_another_camera(demo_set):
    folder, _ = demo_set
    spec = importlib.util.find_spec("skimage")
    with Image.open(Path(spec.origin).parent / "data" / "chelsea.png") as image:
        photo = np.asarray(image.convert("RGB"), float) / 255
    for path in (folder / "test" / "cat").glob("tile_96_*.jpg"):
        left, top, side = box(path.name)
        want = 255 * photo[top : top + side, left : left + side] ** 0.9 * [1, 0.9, 0.75]
        assert np.abs(decode_rgb(path.read_bytes()) - want).mean() < 6
    warm = decode_rgb(next((folder / "test" / "brick").glob("tile_*.jpg")).read_bytes())
    assert warm[..., 0].mean() > warm[..., 1].mean() > warm[..., 2].mean()  # grey was grey


def test_planted_duplicates_and_broken_files(demo_set):
    folder, _ = demo_set
    contents = files(folder)
    ids = Counter(hashlib.sha256(content).digest() for content in contents.values())
    assert sum(count - 1 for count in ids.values()) == 12
    for name, content in contents.items():
        kind = name.split("/")[2].split("_")[0]
        original = contents.get(name.replace("/near_", "/").replace("/copy_", "/"), b"")
        if kind == "leak":
            original = contents[name.replace("train/", "test/").replace("/leak_", "/")]
        if kind == "copy":
            assert content == original
        elif kind in ("near", "leak"):
            assert content != original
            # the same to the eye: patterns agree whatever light and contrast are
            a, b = decode_rgb(content).mean(2), decode_rgb(original).mean(2)
            assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9
            quarters = [b[y : y + 48, x : x + 48].std() for y in (0, 48) for x in (0, 48)]
            assert min(quarters) > 10  # something in every corner
        elif kind == "broken":
            with pytest.raises(BadImage):
                decode_rgb(content)
        elif kind == "flat":
            assert decode_rgb(content).std((0, 1)).max() < 2
        else:
            assert decode_rgb(content).shape == (96, 96, 3)
            assert name.startswith("test") or decode_rgb(content).std() > 4


@pytest.mark.long
def test_the_same_bytes_each_time(demo_set, tmp_path):
    folder, report = demo_set
    assert files(folder) == files(Path(make_demo(tmp_path / "again").folder))
    stamp = (folder / "train").stat().st_mtime_ns
    assert make_demo(folder) == report  # there already: left as it is
    assert (folder / "train").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="not this demo"):
        make_demo(folder, seed=1)


@pytest.mark.long
def test_a_demo_of_an_older_version_is_made_anew(demo_set, tmp_path):
    folder, report = demo_set
    old = tmp_path / "old"
    (old / "train" / "cat").mkdir(parents=True)
    (old / "train" / "cat" / "gone.jpg").write_bytes(b"x")
    (old / ".demo.json").write_text('{"about": {"version": 1, "seed": 0}, "report": {}}')
    assert make_demo(old).train == report.train
    assert files(old) == files(folder)


def test_something_else_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="not this demo"):
        make_demo(tmp_path)
    monkeypatch.setitem(demo._SKIMAGE, "astronaut", "no_such_file.png")
    with pytest.raises(DataError, match="scikit-image"):
        make_demo(tmp_path / "new")


def test_packed_it_gives_what_was_planted(demo_set, tmp_path, tasks_here):
    folder, demo_report = demo_set
    report = packed(folder / "train", tmp_path)
    assert (report.images_packed, report.duplicates) == (3552, 12)
    assert report.bad == {"empty": 1, "not_an_image": 3, "too_large": 1, "truncated": 4}
    assert sum(report.others.values()) == 1  # notes.txt claims to be no image
    assert report.class_names == demo_report.class_names
    shards = open_shards(str(tmp_path / "shards"))
    assert (shards.rows, shards.has_labels) == (3552, True)


def test_a_nearest_neighbour_on_raw_pixels_is_better_than_chance_and_not_perfect(demo_set):
    folder, _ = demo_set
    small, labels = {}, {}
    for part in ("train", "test"):
        paths = sorted((folder / part).glob("*/tile_*.jpg"))
        small[part] = np.stack(
            [
                np.asarray(
                    Image.open(io.BytesIO(path.read_bytes())).convert("RGB").resize((8, 8)),
                    np.float32,
                ).ravel()
                for path in paths
            ]
        )
        labels[part] = np.array([path.parent.name for path in paths])
    a, b = small["test"], small["train"]
    distance = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    right = (labels["train"][distance.argmin(1)] == labels["test"]).mean()
    assert 0.3 < right < 0.95
