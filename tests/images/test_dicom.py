"""DICOM as it is windowed, HEIC, and the sentence where the package for one is not installed."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline.images import pillow as pictures
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import decode, decode_image, image_size, value_span

SIDE = 32
STORED = np.random.default_rng(0).integers(0, 4096, (SIDE, SIDE)).astype("<u2")
STORED[0, :2] = 0, 4095


def dicom(**tags):
    """A file of 12 bits in 16, with these tags set or (None) taken away."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    data.Rows = data.Columns = SIDE
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelData = STORED.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def grey(encoded):
    return decode_image(encoded, 1)[..., 0].astype(int)


def test_windows_slopes_and_inverted_pictures():
    values = STORED.astype(int)
    np.testing.assert_array_equal(grey(dicom()), values >> 4)  # all stored bits
    np.testing.assert_array_equal(
        grey(dicom(PhotometricInterpretation="MONOCHROME1")), 255 - (values >> 4)
    )
    ct = dicom(RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40, 9], WindowWidth=[400, 9])
    # PS3.3 C.11.2.1.2: linear from 40 - 0.5 - 399 / 2 to 40 - 0.5 + 399 / 2
    shares = np.clip((values - 1024 - 39.5) / 399 + 0.5, 0, 1)
    assert abs(grey(ct) - 255 * shares).max() < 0.51
    assert value_span(ct, 1) is None  # the file says itself what is shown
    plain = dicom(RescaleSlope=1, RescaleIntercept=-1024)
    span = value_span(plain, 1)
    assert (span.low, span.high) == (-1024, 3071)
    np.testing.assert_array_equal(grey(plain), values >> 4)
    narrow = decode_image(plain, 1, value_range=(-160, 239))[..., 0]
    np.testing.assert_array_equal(narrow, np.clip((values - 1024 + 160) * 256 // 400, 0, 255))


def test_8_bits_are_taken_as_they_are_whatever_the_slope_and_the_range():
    stored = (STORED % 256).astype("u1")
    tags = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": stored.tobytes()}
    for slope in ({}, {"RescaleSlope": 1, "RescaleIntercept": -9}, {"RescaleSlope": 0.5},
                  {"RescaleSlope": 10, "RescaleIntercept": 3}):  # fmt: skip
        encoded = dicom(**tags, **slope)
        assert value_span(encoded, 1) is None
        for value_range in ("full", (0, 4095), (100, 200)):
            pixels = decode_image(encoded, 1, value_range=value_range)[..., 0]
            np.testing.assert_array_equal(pixels, stored, f"{slope} {value_range}")


def test_first_frame_size_channels_and_format():
    film = dicom(NumberOfFrames=2, PixelData=STORED.tobytes() + bytes(2 * SIDE * SIDE))
    np.testing.assert_array_equal(grey(film), STORED >> 4)
    pixels, form = decode(dicom())
    assert (pixels.shape, form) == ((SIDE, SIDE, 3), "DICOM")
    assert image_size(dicom(), 3) == (SIDE, SIDE)
    colour = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3)).astype("u1")
    rgb = dicom(PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0,
                BitsAllocated=8, BitsStored=8, HighBit=7, PixelData=colour.tobytes())  # fmt: skip
    np.testing.assert_array_equal(decode_image(rgb), colour)


def test_what_cannot_be_read_is_one_reason():
    for encoded in (dicom()[:-100], dicom()[:140], dicom(Rows=0), dicom(Rows=60_000)):
        with pytest.raises(BadImage):
            decode_image(encoded)


def test_heic_and_packages_that_are_missing(monkeypatch):
    fake = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)
    if "pillow_heif" in sys.modules or __import__("importlib.util").util.find_spec("pillow_heif"):
        heif = pytest.importorskip("pillow_heif")
        stream = io.BytesIO()
        red = np.full((40, 60, 3), (200, 30, 30), np.uint8)
        heif.from_pillow(Image.fromarray(red)).save(stream)
        assert abs(decode_image(stream.getvalue()).astype(int) - red).max() <= 8
        with pytest.raises(BadImage, match="undecodable"):
            decode_image(fake)
    pictures._heif.cache_clear()
    for package, encoded in (
        ("pillow_heif", fake),
        ("pydicom", bytes(128) + b"DICM" + bytes(99)),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(BadImage, match=f"pip install {package.replace('_', '-')}"):
            decode_image(encoded)
    pictures._heif.cache_clear()
