"""What a file claims to be, by the ending of its name and by its first bytes.

A file that claims to be an image and cannot be read is a bad image. A file that claims nothing of
the kind (a README, a caption, a video) is left alone. Endings count in any case of letters.
"""

from __future__ import annotations

import re

HEAD = 512  # first bytes of a file that `begins_like_an_image` asks for
TABLES = (".parquet", ".pq")
TARS = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz"),
    *(".tar.lzma", ".tlz", ".tar.zst", ".tzst"),
)
ZIPS = (".zip",)
# Packed in ways that are not read: what is inside is not known to be images, nor not to be.
UNREAD = (
    *(".rar", ".7z", ".tar.lz4", ".tar.lz", ".tar.z", ".cpio", ".cab", ".iso", ".squashfs"),
    *(".gz", ".bz2", ".xz", ".zst", ".lmdb", ".mdb", ".tfrecord", ".h5", ".hdf5", ".arrow", ".npz"),
)
_IMAGES = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "jif", "mpo", "png", "apng", "webp", "gif", "bmp"),
        *("dib", "tif", "tiff", "btf", "ppm", "pgm", "pbm", "pnm", "pam", "pfm", "jp2"),
        *("j2k", "j2c", "jpc", "jpf", "jpx", "jpm", "avif", "avifs", "heic", "heics", "heif"),
        *("heifs", "hif", "jxl", "npy", "dcm", "dicom", "tga", "ico", "cur", "pcx", "psd"),
        *("psb", "svg", "eps", "exr", "hdr", "dng", "cr2", "cr3", "crw", "nef", "nrw", "arw"),
        *("srf", "sr2", "orf", "raf", "rw2", "pef", "srw", "x3f", "3fr", "iiq", "rwl"),
    )
)
_SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG", b"GIF87a", b"GIF89a", b"\x93NUMPY", b"8BPS", b"v/1\x01"),
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0"),  # TIFF, as Pillow takes it
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"\0\0\0\x0cJXL \r\n\x87\n"),
)
_BRANDS = frozenset(  # of ISO media files that hold pictures, not films
    (b"avif", b"avis", b"mif1", b"msf1", b"miaf", b"heic", b"heix", b"heim", b"heis", b"hevc")
)
_PNM = re.compile(rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s")  # README texts begin with P, too
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # bytes of the second header


def is_table(name: str) -> bool:
    """Whether a file is read as parquet."""
    return name.lower().endswith(TABLES)


def is_tar(name: str) -> bool:
    """Whether a file is read as a tar archive, compressed or not."""
    return name.lower().endswith(TARS)


def is_zip(name: str) -> bool:
    """Whether a file is read as a zip archive."""
    return name.lower().endswith(ZIPS)


def is_archive(name: str) -> bool:
    """Whether a file is read as an archive of images."""
    return is_tar(name) or is_zip(name)


def is_unread_archive(name: str) -> bool:
    """Whether a file may hold images in a way that is not read."""
    return name.lower().endswith(UNREAD) and not is_archive(name)


def named_as_image(name: str) -> bool:
    """Whether the ending of a name is that of a picture."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() in _IMAGES and "." in name


def claims_images(name: str) -> bool:
    """Whether a name promises images: those of a picture, an archive, or a table."""
    return named_as_image(name) or is_archive(name) or is_table(name)


def begins_like_an_image(head: bytes) -> bool:
    """Whether the first HEAD bytes are those of a format for pictures, read by us or not."""
    if head.startswith(_SIGNATURES):
        return True
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        return head[8:12] in _BRANDS
    if head[:2] == b"BM":
        return int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    return head[128:132] == b"DICM" or _PNM.match(head) is not None
