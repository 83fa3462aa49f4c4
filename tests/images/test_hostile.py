"""Every kind of hostile file: packed right or listed with the right reason, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.images.bad_image import pixel_limit
from pipeline.images.decode import BadImage, decode, decode_shrunk, image_size
from pipeline.pack.listing import list_source
from pipeline.pack.pack import MAX_IMAGE_BYTES, RUN_BYTES
from pipeline.pack.sorted_runs import PackSpec, write_runs
from pipeline.pack.sources import Reading, plan_tasks
from pipeline.shards.row_group import read_row_group
from pipeline.shards.shards import open_shards
from pipeline.views.crops import (
    CropSpec,
    crop_boxes,
    cut_crops,
    decode_shrink,
    scale_boxes,
    uniforms,
)
from tests.data import packed
from tests.images import hostile as h
from tests.images.hostile_kinds import Kind, catalogue, jp2
from tests.pack.test_pack import tar_of, write

GIB = 2**30
KINDS = {kind.name: kind for kind in catalogue()}
GOOD = {name: kind for name, kind in KINDS.items() if not kind.reason}
SPEC = CropSpec(global_size=28, local_size=14, local_crops=2)


def check(kind: Kind, encoded: bytes) -> None:
    pixels, form = decode(encoded)
    assert form == kind.form
    assert kind.picture is not None and pixels.shape == kind.picture.shape
    assert np.abs(pixels.astype(int) - kind.picture).max() <= kind.tolerance


def crops_of(encoded: bytes) -> None:
    """What training does with a packed image."""
    height, width = image_size(encoded)
    u = uniforms(0, 0, np.zeros((1, 16), np.uint8), SPEC.draws)[0]
    boxes, flips = crop_boxes(u, width, height, SPEC)
    image, shrink = decode_shrunk(encoded, int(decode_shrink(boxes, SPEC)))
    scaled = scale_boxes(boxes, shrink, *image.shape[:2])
    crops = cut_crops(image, scaled, flips, SPEC)
    assert [crop.shape for crop in crops] == [(2, 28, 28, 3), (2, 14, 14, 3)]


def test_the_catalogue_has_many_kinds_and_no_copies():
    assert len(KINDS) == len(catalogue()) > 100
    assert len({kind.encoded for kind in catalogue()}) == len(KINDS)
    assert {kind.reason for kind in catalogue()} == {
        "", "empty", "not_an_image", "undecodable", "truncated", "too_large"
    }  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_gives_its_picture_or_its_reason(name):
    kind = KINDS[name]
    if not kind.reason:
        check(kind, kind.encoded)
        crops_of(kind.encoded)
        assert kind.picture is not None
        assert image_size(kind.encoded) == kind.picture.shape[:2]
        return
    with pytest.raises(BadImage) as caught:
        decode(kind.encoded)
    assert (caught.value.reason, bool(caught.value.detail)) == (kind.reason, True)
    try:
        assert image_size(kind.encoded) != (0, 0)
    except BadImage as bad:
        assert bad.reason == kind.reason


def test_a_lower_limit_holds_for_every_kind_by_its_header(monkeypatch):
    """With the decoders taken away, what is too large is still said to be so."""
    for kind in GOOD.values():
        height, width = image_size(kind.encoded)
        for call in (decode, lambda encoded, limit: image_size(encoded, 3, limit)):
            with pytest.raises(BadImage) as caught:
                call(kind.encoded, height * width - 1)
            assert caught.value.reason == "too_large", kind.name


def test_limits_are_lower_where_a_pixel_needs_more():
    million = 10**6
    # as docs/decoding.md says
    at_default = {3: 200, 4: 200, 7: 142, 9: 111, 12: 83, 15: 66, 17: 58, 20: 50}
    for needs, limit in at_default.items():
        assert pixel_limit(200 * million, needs) // million == limit
        assert pixel_limit(2000 * million, needs) // (10 * million) == limit
        assert pixel_limit(40 * million, needs) == 40 * million
    with pytest.raises(BadImage, match="at most 50000000"):
        image_size(jp2(7072, 7072))
    assert image_size(jp2(7000, 7000)) == (7000, 7000)


# ---- packed

FILMS = dict.fromkeys(("film.mp4", "paper.pdf"), "other")  # they claim to be no image


def folder_of(root: Path) -> dict[str, str]:
    """All kinds as files, and what a file system can do beside them; returns name -> reason."""
    for name, kind in KINDS.items():
        write(root / name, kind.encoded)
    secret = write(root.parent / "elsewhere" / "secret.jpg", h.jpeg(200))
    links = {"out.jpg": secret, "climb.jpg": "../elsewhere/secret.jpg", "missing.jpg": "nothing",
             "device.jpg": "/dev/zero", "folder": secret.parent, "self.jpg": "self.jpg",
             "top": root}  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.jpg")
    bad = dict.fromkeys(set(links) - {"top"}, "link") | {"pipe.jpg": "not_an_image"}
    return bad | {"top": "other", "archive.zip": "undecodable", **FILMS}


def tar_file_of(root: Path) -> dict[str, str]:
    members = [(name, kind.encoded) for name, kind in KINDS.items()]
    odd = {
        "../evil.jpg": (h.jpeg(201), "outside"),
        "a/../../evil.jpg": (h.jpeg(202), "outside"),
        "/abs_evil.jpg": (h.jpeg(203), "outside"),
        "link_evil.jpg": ((tarfile.SYMTYPE, "/etc/passwd"), "link"),
        "hard_evil.jpg": ((tarfile.LNKTYPE, "../../elsewhere/secret.jpg"), "link"),
        "disk_evil.jpg": ((tarfile.BLKTYPE, ""), "not_an_image"),
        "zero_evil.jpg": ((tarfile.CHRTYPE, ""), "not_an_image"),
        "pipe_evil.jpg": ((tarfile.FIFOTYPE, ""), "not_an_image"),
    }
    members += [(name, content) for name, (content, _) in odd.items()]
    write(root / "all.tar", tar_of(members))
    return {name: reason for name, (_, reason) in odd.items()} | FILMS


def parquet_of(root: Path) -> dict[str, str]:
    root.mkdir(parents=True, exist_ok=True)
    encoded = [kind.encoded for kind in KINDS.values()]
    table = pa.table({"image": pa.array([*encoded, None], pa.binary())})
    pq.write_table(table, root / "all.parquet", row_group_size=50)
    return {f"all.parquet#{len(encoded)}": "empty"}


def named(source: str) -> str:
    """The kind's name, from the source of a row."""
    if source.startswith("all.parquet#") and int(source[12:]) < len(KINDS):
        return list(KINDS)[int(source[12:])]
    return source.removeprefix("all.tar/")


def wanted(odd: dict[str, str]) -> dict[str, str]:
    return {name: kind.reason for name, kind in KINDS.items() if kind.reason} | odd


def files_under(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize("fill", [folder_of, tar_file_of, parquet_of])
def test_a_reading_task_takes_the_good_and_lists_the_rest(tmp_path, fill):
    root, scratch = tmp_path / "in", tmp_path / "work"
    root.mkdir()
    odd = fill(root)
    before = files_under(tmp_path)
    listing = list_source(str(root))
    reading = Reading("image", "label", MAX_IMAGE_BYTES)
    plan = plan_tasks(str(root), listing, reading)
    reading = replace(reading, extras=plan.extras)
    spec = PackSpec(str(root), listing.root, str(tmp_path / "shards"), str(scratch), reading,
                    200_000_000, 256, RUN_BYTES, ())  # fmt: skip
    bad = {item.source: item.reason for item in plan.refused}
    bad |= {item.source: "other" for item in plan.others}
    taken = {}
    for index, task in enumerate(plan.tasks):
        account = write_runs(index, task, spec)
        bad |= {source: reason for source, reason, *_ in account["bad"]}
        bad |= {source: "other" for source, *_ in account["others"]}
        for run in account["runs"]:
            stored = Path(run["path"] + ".bin").read_bytes()
            for row in pq.read_table(run["path"] + ".parquet").to_pylist():
                encoded = stored[row["offset"] : row["offset"] + row["size"]]
                taken[named(row["source"])] = encoded
                picture = GOOD[named(row["source"])].picture
                assert picture is not None
                assert (row["height"], row["width"]) == picture.shape[:2]
                assert row["format"] == GOOD[named(row["source"])].form
    assert {named(source): reason for source, reason in bad.items()} == wanted(odd)
    assert taken == {name: kind.encoded for name, kind in GOOD.items()}
    new = files_under(tmp_path) - before
    assert new and all(path.startswith(str(scratch)) for path in new)


def check_pack(tmp_path: Path, fill) -> None:
    root = tmp_path / "in"
    root.mkdir()
    odd = fill(root)
    before = files_under(tmp_path)
    report = packed(root, tmp_path / "out", max_bad_fraction=1.0)
    assert report.images_packed == len(GOOD) and report.duplicates == 0
    bad = pq.read_table(tmp_path / "out" / "bad.parquet").to_pylist()
    left = pq.read_table(tmp_path / "out" / "other_files.parquet").to_pylist()
    assert {named(row["source"]): row["reason"] for row in bad} | {
        named(row["source"]): "other" for row in left
    } == wanted(odd)
    shards = open_shards(str(tmp_path / "out" / "shards"))
    names = {kind.encoded: name for name, kind in GOOD.items()}
    seen = set()
    for file, about in enumerate(shards.files):
        for group, rows in enumerate(about.row_groups):
            table = read_row_group(shards, file, group)
            for row in range(rows):
                name = names[bytes(table.image(row))]
                seen.add(name)
                check(GOOD[name], table.image(row))
                crops_of(table.image(row))
    assert seen == set(GOOD)
    new = files_under(tmp_path) - before
    assert new and all(path.startswith(str(tmp_path / "out")) for path in new)


@pytest.mark.parametrize("fill", [folder_of, tar_file_of, parquet_of])
def test_a_whole_pack_and_training_on_it(tmp_path, tasks_here, fill):
    check_pack(tmp_path, fill)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_whole_pack_on_ray(tmp_path):
    check_pack(tmp_path, folder_of)


# ---- memory

CHILD = """
import sys
from pathlib import Path
from pipeline.images.decode import BadImage, decode, decode_shrunk, image_size

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

for file in sorted(Path(sys.argv[2]).iterdir()):  # libraries are loaded by their first file
    decode(file.read_bytes())
base = peak()
for file in sorted(Path(sys.argv[1]).iterdir()):
    encoded = file.read_bytes()
    for call in (decode, image_size, lambda encoded: decode_shrunk(encoded, 8)):
        try:
            call(encoded)
        except BadImage:
            pass
    print(file.name, peak() - base)
"""


WARM = (
    *("wavelet.jp2", "small.avif", "lossless.webp", "deflate.tif", "animated.gif", "lab.tif"),
    *("progressive.jpg", "cmyk.jpg", "palette.png", "run_length.bmp"),
)


def peaks(folder: Path, warm: Path) -> dict[str, int]:
    """File -> bytes of memory above the baseline up to it, in a process that decodes one by one."""
    for name in WARM:
        write(warm / name, KINDS[name].encoded)
    command = [sys.executable, "-W", "error", "-c", CHILD, str(folder), str(warm)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    assert done.stderr == ""
    return {line.split()[0]: int(line.split()[1]) * 1024 for line in done.stdout.splitlines()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_kind_takes_much_memory(tmp_path):
    for name, kind in KINDS.items():
        write(tmp_path / "files" / name, kind.encoded)
    peak_of = peaks(tmp_path / "files", tmp_path / "warm")
    assert set(peak_of) == set(KINDS)
    assert max(peak_of.values()) < GIB / 4


def largest(mode: str, form: str, side: int, path: Path, **options: Any) -> None:
    """A flat picture: the smallest file with this many pixels."""
    options |= {"progressive": True, "subsampling": 0} if form == "JPEG" else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = 0 if mode == "L" else (9,) * len(mode)
    Image.new(mode, (side, side), colour).save(path, form, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "form", "bytes_per_pixel"),
    [
        ("L", "PNG", 4),
        ("RGB", "PNG", 7),
        ("RGBA", "PNG", 7),
        ("L", "GIF", 4),
        ("RGBA", "WEBP", 17),
        ("RGB", "JPEG", 9),
        ("RGB", "JPEG2000", 20),
        ("RGBA", "AVIF", 15),
        ("RGBA", "TIFF", 15),
    ],
)
def test_the_largest_picture_that_is_read_takes_less_than_a_gibibyte(
    tmp_path, mode, form, bytes_per_pixel
):
    """One just under the limit of its format, and one just over it that costs nothing."""
    limit = int(min(200_000_000, 200_000_000 * 5 / bytes_per_pixel) ** 0.5)
    quick = {"TIFF": {"compression": "tiff_adobe_deflate"}, "PNG": {"compress_level": 1}}
    options = quick.get(form, {})
    largest(mode, form, limit, tmp_path / "files" / "a", **options)
    largest(mode, form, limit + 9, tmp_path / "over" / "b", **options)
    peak_of = peaks(tmp_path / "files", tmp_path / "warm")
    assert GIB / 3 < peak_of["a"] < GIB
    with pytest.raises(BadImage, match="too_large"):
        decode((tmp_path / "over" / "b").read_bytes())
