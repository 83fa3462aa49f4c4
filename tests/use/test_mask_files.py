"""Mask files: read as Pillow's pixels say, refused in a sentence, written to be read again."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.use.masks import COLOURS, Classes, read_masks
from pipeline.use.segment import VOID
from tests.data import encoded

IDS = np.array([[0, 0, 3, 3], [1, 1, 11, 3], [1, 255, 3, 0]], np.uint8)


def file_of(values: np.ndarray, kind: str = "PNG", mode: str = "") -> bytes:
    picture = Image.fromarray(values)
    if mode == "P":
        picture.putpalette(list(range(256)) * 3)
    elif mode:
        picture = picture.convert(mode)
    return encoded(picture, kind)


@pytest.mark.parametrize("mode", ["", "P", "I;16", "RGB", "RGBA", "LA"])
def test_ids_of_every_kind_of_file(mode: str) -> None:
    values = IDS.astype(np.uint16) if mode == "I;16" else IDS
    content = file_of(values, mode="" if mode == "I;16" else mode)
    (mask,), classes = read_masks([("m.png", content)], {})
    assert classes.ids == (0, 1, 3, 11)
    assert classes.names == ("class 0", "class 1", "class 3", "class 11")
    assert not classes.background
    for y, x in np.ndindex(IDS.shape):
        expected = VOID if IDS[y, x] == 255 else classes.ids.index(IDS[y, x])
        assert mask[y, x] == expected


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P"])
def test_black_and_white(mode: str) -> None:
    values = np.where(IDS == 3, 255, 0).astype(np.uint8)
    (mask,), classes = read_masks([("m.png", file_of(values, mode=mode))], {})
    assert classes == Classes((0, 255), ("around", "object"), background=True)
    assert np.array_equal(mask, IDS == 3)


def test_zero_and_one_are_two_classes() -> None:
    (mask,), classes = read_masks([("m.png", file_of((IDS == 3).astype(np.uint8)))], {})
    assert classes.names == ("class 0", "class 1")
    assert np.array_equal(mask, IDS == 3)


def test_names_by_id_and_the_others() -> None:
    (mask,), classes = read_masks([("m.png", file_of(IDS))], {"road": 3, "sky": 0}, void=11)
    assert classes.names == ("other", "road", "sky") and classes.background
    assert classes.ids == (11, 3, 0)  # none twice, else what is written could not be told apart
    expected = {3: 1, 0: 2, 1: 0, 255: 0, 11: VOID}
    assert np.array_equal(mask, np.vectorize(expected.get)(IDS))


def test_a_mask_of_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)  # Pillow refuses twice as many
    with pytest.raises(DataError, match=r"m\.png cannot be read as a picture: .*exceeds limit"):
        read_masks([("m.png", file_of(IDS))], {})


def test_no_class_is_written_as_the_others() -> None:
    (mask,), classes = read_masks([("m.png", file_of(IDS))], {"car": 255, "road": 3}, void=0)
    assert classes.names == ("other", "car", "road") and classes.ids == (0, 255, 3)
    written = np.asarray(Image.open(io.BytesIO(classes.encoded(np.where(mask == VOID, 0, mask)))))
    assert np.array_equal(written, np.where(np.isin(IDS, (255, 3)), IDS, 0))
    with pytest.raises(DataError, match=r"look\.void=255 is the id of a class that has a name"):
        read_masks([("m.png", file_of(IDS))], {"car": 255})


def test_black_is_no_class_where_it_was_said_so() -> None:
    values = np.where(IDS == 3, 255, 0).astype(np.uint8)
    with pytest.raises(DataError, match="shows class 255, expected two classes"):
        read_masks([("m.png", file_of(values))], {}, void=0)


def test_all_named() -> None:
    values = np.array([[1, 2], [2, 255]], np.uint8)
    (mask,), classes = read_masks([("m.png", file_of(values))], {"a": 2, "b": 1})
    assert classes.names == ("a", "b") and not classes.background
    assert mask.tolist() == [[1, 0], [0, VOID]]


def test_several_masks_share_their_classes() -> None:
    first, second = np.array([[0, 4]], np.uint8), np.array([[4], [9]], np.uint8)
    masks, classes = read_masks([("a.png", file_of(first)), ("b.png", file_of(second))], {})
    assert classes.ids == (0, 4, 9)
    assert masks[0].tolist() == [[0, 1]] and masks[1].tolist() == [[1], [2]]


@pytest.mark.parametrize("names", [{}, {"road": 3, "sky": 0}])
def test_what_is_written_is_read_again(names: dict[str, int]) -> None:
    (mask,), classes = read_masks([("m.png", file_of(IDS))], names)
    known = np.where(mask == VOID, 0, mask)
    picture = Image.open(io.BytesIO(classes.encoded(known)))
    assert np.array_equal(np.asarray(picture), np.asarray(classes.ids)[known])
    assert picture.mode == "P"
    colours = np.asarray(picture.convert("RGB"))
    assert np.array_equal(colours, classes.colours()[known])


def test_black_and_white_is_written_so() -> None:
    white = np.where(IDS == 3, 255, 0).astype(np.uint8)
    (mask,), classes = read_masks([("m.png", file_of(white))], {})
    picture = Image.open(io.BytesIO(classes.encoded(mask)))
    assert picture.mode == "L" and np.array_equal(np.asarray(picture), white)


def test_colours_go_round() -> None:
    colours = Classes(tuple(range(25)), tuple(map(str, range(25)))).colours()
    assert np.array_equal(colours[0], colours[len(COLOURS)])


BLACK, WHITE = np.zeros((4, 4), np.uint8), np.full((4, 4), 255, np.uint8)
PHOTO = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "names", "what"),
    [
        (file_of(BLACK), {}, "m.png is empty: all its pixels are black"),
        (file_of(WHITE), {}, "m.png is white all over"),
        (file_of(IDS, "JPEG"), {}, "m.png is a JPEG"),
        (file_of(PHOTO), {}, "a picture in colours, not a mask"),
        (b"no picture", {}, "m.png cannot be read as a picture"),
        (file_of(BLACK + 7), {}, "m.png shows class 7, expected two classes at least"),
        (file_of(IDS), {"car": 8}, r"no pixel of m.png is of the class car \(8\)"),
        (file_of(BLACK), {"sky": 0}, "m.png shows sky, expected two classes at least"),
        (file_of(IDS.astype(np.uint16) * 100), {}, "ids from 0 to 25500, expected 0 to 255"),
    ],
)
def test_sentences(content: bytes, names: dict[str, int], what: str) -> None:
    with pytest.raises(DataError, match=what) as error:
        read_masks([("m.png", content)], names)
    assert error.value.hint
