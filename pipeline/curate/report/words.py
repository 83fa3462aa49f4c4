"""Plain words of the report: what each reason, rule and table is called, and how numbers look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.curate.rows.tables import REASONS

NAME = 26  # letters of a file's name below its picture
REMOVED = tuple(reason for reason in REASONS if reason != "kept")
# Where images go, in the order of precedence of their reasons.
STAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("can be read", ("undecodable",)),
    ("pass the quality rules", ("too_small", "aspect", "flat")),
    ("are not the same file twice", ("duplicate_bytes",)),
    ("are in no evaluation set", ("leaks_evaluation",)),
    ("are not copies of one another", ("duplicate_near",)),
    ("are like a seed image", ("not_retrieved",)),
    ("are in the balanced sample", ("balanced_out",)),
)


@dataclass(frozen=True)
class Words:
    """How a reason is told.

    Attributes:
        name: in a table or below a picture.
        one: follows "1".
        many: follows any other number.
        colour: of CSS.
        rgb: the same in pictures, as a light page has it.
        meaning: a sentence.
    """

    name: str
    one: str
    many: str
    colour: str
    rgb: tuple[int, int, int]
    meaning: str


WORDS = {
    "kept": Words(
        "kept", "is kept", "are kept", "var(--good)", (43, 138, 87), "Goes into the curated set."),
    "undecodable": Words(
        "cannot be read", "cannot be read", "cannot be read", "var(--c6)", (107, 114, 128),
        "The file is broken, empty or no image."),
    "too_small": Words(
        "too small", "is too small", "are too small", "var(--c7)", (143, 90, 60),
        "Its shorter side has too few pixels."),
    "aspect": Words(
        "too long and thin", "is too long and thin", "are too long and thin",
        "var(--c8)", (15, 127, 134),
        "Its long side is too many times the short one, as of a banner or a ruler."),
    "flat": Words(
        "almost nothing to see", "shows almost nothing", "show almost nothing",
        "var(--c4)", (184, 134, 11),
        "One colour, a gradient, noise alone, too little contrast, too dark, too bright or "
        "blurred, and no clear edges as logos and charts have them. The rule says it."),
    "duplicate_bytes": Words(
        "same file again", "is a file that comes twice", "are files that come twice",
        "var(--c3)", (138, 75, 184), "Byte for byte the same as an image that is kept."),
    "duplicate_near": Words(
        "copy of another image", "is a copy of another image", "are copies of another image",
        "var(--c0)", (37, 99, 201),
        "Shows the same picture as one that is kept: saved again, resized, cropped, mirrored or "
        "recoloured. The best one of each group stays."),
    "leaks_evaluation": Words(
        "in an evaluation set", "is in an evaluation set", "are in an evaluation set",
        "var(--c5)", (194, 59, 95),
        "A copy of an image that models are tested with. Training on it would make results look "
        "better than they are."),
    "not_retrieved": Words(
        "like no seed image", "is like no seed image", "are like no seed image",
        "var(--c1)", (217, 98, 43), "No image of the seed sets asked for it."),
    "balanced_out": Words(
        "too many of its kind", "is too many of its kind", "are too many of their kind",
        "var(--c9)", (85, 102, 168),
        "Its cluster is large and had its share, so that rare things count too."),
}  # fmt: skip
COLOURS = {reason: words.colour for reason, words in WORDS.items()}
RGB = {reason: words.rgb for reason, words in WORDS.items()}
RULES = {
    "min_side": "shorter side, pixels",
    "max_aspect": "long over short side",
    "min_entropy": "entropy of the brightness, bits",
    "min_contrast": "contrast, of 255",
    "min_brightness": "brightest 5 %, of 255",
    "max_brightness": "darkest 5 %, of 255",
    "min_sharpness": "sharpness",
}


def name_of(reason: str) -> str:
    """A reason in plain words; one that is not known stays as it is."""
    return WORDS[reason].name if reason in WORDS else reason


def phrase(number: int, reason: str) -> str:
    """1 is too small, 12 are too small."""
    words = WORDS[reason]
    return f"{number:,} {words.one if number == 1 else words.many}"


def images(number: int) -> str:
    """1 image, 12,345 images."""
    return f"{number:,} image" + ("" if number == 1 else "s")


def share(part: float, whole: float) -> str:
    """12.3 %; "–" of nothing. Never 0 % or 100 % of what is not none or all."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1\u00a0%"
    if 99.9 < percent < 100:
        return "> 99.9\u00a0%"
    return f"{percent:.1f}\u00a0%" if percent < 99.95 and percent else f"{percent:.0f}\u00a0%"


def similarity(number: float) -> str:
    """0.953; 1.000 only where it is one."""
    number = min(number, 1.0)  # unit vectors in half precision come to 1.0001
    return f"{number:.3f}" if number >= 1 or number < 0.9995 else "> 0.999"


def listed(parts: list[str]) -> str:
    """A, b and c."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def file_name(path: str) -> str:
    """The last part of a path, cut in its middle where it is long; "" of none."""
    name = path.rstrip("/").rpartition("/")[2]
    return name if len(name) <= NAME else f"{name[: NAME - 11]}…{name[-10:]}"


def largest(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """What is above zero, largest first, equal ones by name."""
    return sorted(((k, v) for k, v in counts.items() if v), key=lambda kv: (-kv[1], kv[0]))
