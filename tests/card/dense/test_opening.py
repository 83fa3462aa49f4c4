"""Sets of masks and depth: both forms, and each way in which a file can be of no use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.card.dense import open_dense_set
from pipeline.card.dense.sets import DEPTH, MASKS, DenseSet
from pipeline.errors import DataError
from pipeline.shards.columns import image_id
from tests.card.dense.planted import depth_set, mask_set, npy, painted, sloped, tiff, write
from tests.data import encoded


def names(dense: DenseSet) -> list[str]:
    return [row.name for row in dense.rows]


def read(dense: DenseSet) -> list[tuple[np.ndarray, np.ndarray | None, np.ndarray | None]]:  # type: ignore[type-arg]
    return [(s.pixels, s.mask, s.depth) for s in dense.samples(range(len(dense.rows)))]


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    dense = open_dense_set(mask_set(tmp_path, 40))
    assert dense.targets == (MASKS,)
    assert dense.class_ids == (0, 1, 2)
    assert not dense.remarks
    assert [bytes(one).hex() for one in dense.ids] == [
        image_id((tmp_path / f"images/{n:03}.png").read_bytes()) for n in range(40)
    ]
    for number, (pixels, mask, depth) in enumerate(read(dense)):  # more than are read at once
        expected_pixels, expected_mask = painted(number)
        assert (pixels == expected_pixels).all()
        assert mask is not None
        assert (mask == expected_mask).all()
        assert depth is None


def test_other_masks_are_another_set(tmp_path: Path) -> None:
    one = open_dense_set(mask_set(tmp_path, 3))
    assert open_dense_set(str(tmp_path)).digest == one.digest
    (tmp_path / "masks/001.png").write_bytes((tmp_path / "masks/002.png").read_bytes())
    assert open_dense_set(str(tmp_path)).digest != one.digest


@pytest.mark.parametrize("form", ["npy", "tiff", "png"])
def test_depth_keeps_its_values_in_each_form(tmp_path: Path, form: str) -> None:
    pixels, depth = sloped(0)
    depth[0, :4] = [0, np.nan, np.inf, -1] if form != "png" else 0
    whole = np.round(depth * 1000).astype(np.uint16) if form == "png" else depth
    content = {"npy": npy, "tiff": tiff, "png": encoded}[form](whole)
    root = write(tmp_path, {"images/a/b.jpg": encoded(pixels), f"depth/a/b.{form}": content})
    dense = open_dense_set(root)
    assert dense.targets == (DEPTH,)
    ((_, mask, values),) = read(dense)
    assert mask is None
    assert values is not None
    assert (values[0, :4] == 0).all()
    assert (values[0, 4:] == whole[0, 4:]).all()
    assert (values[1:] == whole[1:]).all()


def test_parquet_is_read_as_hubs_store_it(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    painting = [painted(seed) for seed in range(7)]
    depths = [np.full((48, 32), 500 + seed, np.uint16) for seed in range(7)]

    def column(contents: list[bytes]) -> pa.Array:
        return pa.array([{"bytes": one, "path": None} for one in contents], kind)

    table = pa.table(
        {
            "image": column([encoded(pixels) for pixels, _ in painting]),
            "mask": column([encoded(mask) for _, mask in painting]),
            "depth": column([encoded(depth) for depth in depths]),
            "scene": ["x"] * 7,
        }
    )
    pq.write_table(table.slice(0, 5), tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(table.slice(5), tmp_path / "b.parquet")
    dense = open_dense_set(str(tmp_path))
    assert dense.targets == (MASKS, DEPTH)
    assert len(dense.rows) == 7
    for (pixels, mask, depth), (p, m), d in zip(read(dense), painting, depths, strict=True):
        assert (pixels == p).all()
        assert mask is not None and (mask == m).all()
        assert depth is not None and (depth == d).all()
    (last,) = dense.samples([6])
    assert (last.pixels == painting[6][0]).all()


def damaged(root: Path) -> str:
    """Ten images, of which one pair in two is of no use, each for another reason."""
    mask_set(root, 10)
    (root / "masks/000.png").unlink()
    (root / "images/001.png").unlink()
    (root / "images/002.png").write_bytes((root / "images/002.png").read_bytes()[:200])
    (root / "masks/003.png").write_bytes(b"no picture")
    (root / "masks/004.png").write_bytes(encoded(np.zeros((48, 31), np.uint8)))
    (root / "masks/005.png").write_bytes(encoded(np.full((48, 32), 255, np.uint8)))
    write(
        root,
        {"images/006.jpg": encoded(painted(6)[0]), "images/notes.txt": b"", "images/x.png": b""},
    )
    write(root, {"masks/x.png": encoded(painted(0)[1]), "masks/.007.png": b"of the system"})
    return str(root)


def test_what_is_of_no_use_is_left_out_and_said(tmp_path: Path) -> None:
    dense = open_dense_set(damaged(tmp_path))
    assert names(dense) == ["006", "007", "008", "009"]
    assert len(dense.ids) == 4
    said = " ".join(dense.remarks)
    reasons = [
        "no file in masks/ of the same name (000)",
        "no file in images/ of the same name (001)",
        "the image cannot be read (truncated) (002)",
        "the mask cannot be read (003)",
        "another size of image and mask (004)",
        "all pixels of the mask are void (005)",
        "a second file of the same name (006.png)",
        "its image is empty or cannot be read (x)",
    ]
    assert [reason for reason in reasons if reason not in said] == []
    assert len(dense.remarks) == len(reasons)
    assert len(read(dense)) == 4


def test_many_that_are_left_out_are_counted(tmp_path: Path) -> None:
    mask_set(tmp_path, 12)
    for number in range(9):
        (tmp_path / f"masks/{number:03}.png").unlink()
    (remark,) = open_dense_set(str(tmp_path)).remarks
    assert "9 left out: no file in masks/ of the same name (000, 001, 002 and 6 more)" in remark


def test_depth_that_is_unknown_everywhere_is_left_out(tmp_path: Path) -> None:
    depth_set(tmp_path, 3)
    (tmp_path / "depth/001.npy").write_bytes(npy(np.full((48, 32), np.nan, np.float32)))
    (tmp_path / "depth/002.npy").write_bytes(npy(np.ones((48, 32, 3), np.float32)))
    dense = open_dense_set(str(tmp_path))
    assert names(dense) == ["000"]
    assert "all pixels of the depth are unknown (001)" in " ".join(dense.remarks)
    assert "the depth cannot be read (002)" in " ".join(dense.remarks)


def test_images_of_a_set_with_both_targets_need_both(tmp_path: Path) -> None:
    mask_set(tmp_path, 3)
    for number in (0, 2):
        write(tmp_path, {f"depth/{number:03}.npy": npy(np.ones((48, 32), np.float32))})
    dense = open_dense_set(str(tmp_path))
    assert dense.targets == (MASKS, DEPTH)
    assert names(dense) == ["000", "002"]
    assert "no file in depth/ of the same name (001)" in " ".join(dense.remarks)


def test_void_is_what_the_user_says(tmp_path: Path) -> None:
    mask_set(tmp_path, 3)
    dense = open_dense_set(str(tmp_path), void=(1,))
    assert dense.class_ids == (0, 2)
    for number, (_, mask, _) in enumerate(read(dense)):
        truth = painted(number)[1]
        assert mask is not None
        assert (mask == np.array([0, 255, 1])[truth]).all()


def test_black_and_white_masks_have_a_white_class(tmp_path: Path) -> None:
    pixels, mask = painted(0, classes=2)
    files = {"images/a.png": encoded(pixels), "masks/a.png": encoded(255 * mask)}
    dense = open_dense_set(write(tmp_path, files))
    assert dense.class_ids == (0, 255)
    assert "white is a class" in dense.remarks[0]
    ((_, read_mask, _),) = read(dense)
    assert read_mask is not None
    assert (read_mask == mask).all()
    files = {"images/a.png": encoded(pixels), "masks/a.png": encoded(mask + 254)}
    assert open_dense_set(write(tmp_path, files)).class_ids == (254,)  # 255 is void


def test_palette_masks_are_their_ids(tmp_path: Path) -> None:
    pixels, mask = painted(0)
    picture = Image.fromarray(mask, "L").convert("P")
    picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    files = {"images/a.png": encoded(pixels), "masks/a.png": encoded(picture)}
    ((_, read_mask, _),) = read(open_dense_set(write(tmp_path, files)))
    assert read_mask is not None
    assert (read_mask == mask).all()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no parquet files"),
        ({"images/a.png": encoded(painted(0)[0])}, "has no folder masks or depth"),
        ({"images/a.png": b"", "masks/b.png": b""}, "no image of"),
        (
            {"images/a.png": b"x", "masks/a.png": b"x"},
            "the image cannot be read (not_an_image) (a)",
        ),
        ({"a.parquet": b"PAR1"}, "is not a readable parquet file"),
    ],
)
def test_sets_of_no_use_are_refused_in_one_sentence(
    tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    with pytest.raises(DataError) as refusal:
        open_dense_set(write(tmp_path, files), "evaluate.dense_queries")
    assert said in refusal.value.what
    assert "evaluate.dense_queries" in refusal.value.what or "parquet file" in said


def test_images_of_other_channels_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    mask = painted(0)[1]
    pixels = np.stack([mask * 7, mask, mask, mask, mask], -1)
    root = write(tmp_path, {"images/a.npy": npy(pixels), "masks/a.png": encoded(mask)})
    ((read_pixels, _, _),) = read(open_dense_set(root, channels=5))
    assert (read_pixels == pixels).all()
    with pytest.raises(DataError, match="the image cannot be read"):
        open_dense_set(root)


def test_a_place_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluate\.dense: no such path: .*nowhere"):
        open_dense_set(str(tmp_path / "nowhere"))


def test_parquet_without_targets_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the columns image, label, expected pictures"):
        open_dense_set(str(tmp_path))


def test_an_image_that_is_gone_later_is_named(tmp_path: Path) -> None:
    dense = open_dense_set(mask_set(tmp_path, 2))
    (tmp_path / "images/001.png").unlink()
    with pytest.raises(DataError, match="001"):
        read(dense)
