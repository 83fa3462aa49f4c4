"""`curate.query=photo.jpg`: whether an image is like one that was curated, and like which.

It goes by vectors alone. A curation that adds the image looks whether both show the same.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from pipeline.config.config import Config
from pipeline.context import result_line
from pipeline.curate.copies.other_sets import look_up
from pipeline.curate.copies.pairs import Index
from pipeline.curate.earlier import Earlier, check_inputs, earlier_runs
from pipeline.curate.embed.embed import unit_vectors
from pipeline.curate.images.descriptor import describe, visiting
from pipeline.curate.models import embedder_of
from pipeline.curate.report.read import parquet_names
from pipeline.curate.rows.tables import read_table
from pipeline.embed.embedders import DESCRIPTOR, open_embedder
from pipeline.errors import DataError, shortened
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import decode_image
from pipeline.images.shown import three_channels
from pipeline.images.value_range import FULL, ValueRange, from_json
from pipeline.storage.places import absolute_uri, resolve_uri
from pipeline.storage.run_folder import RunFolder, atomic
from pipeline.storage.transfer import read_bytes
from pipeline.uri import join, public

log = logging.getLogger("pipeline.curate")

SAID = 10  # images that are named
SHOWN_SIDE = 320  # of an image in the picture of both, pixels
GAP, LINE = 8, 18  # white between images; height of a line of text, pixels
NEAR = 0.1  # so far below the threshold the nearest image is shown


@dataclass(frozen=True)
class Answer:
    """An image of a curation that is like the one that was asked for."""

    run: str
    similarity: float
    threshold: float
    decision: dict[str, Any]
    path: str
    thumbnail: bytes

    @property
    def alike(self) -> bool:
        """Whether the two are so like each other that a curation would look whether they show the
        same.
        """
        return self.similarity > self.threshold

    def line(self) -> str:
        """One sentence."""
        what = self.decision
        name = self.path or what["source"]
        state = "kept" if what["kept"] else what["reason"]
        if what["keeper_id"]:
            state += f" of {what['keeper_id']}"
        is_it = "alike" if self.alike else "less alike"
        return (
            f"{what['image_id']} ({name}; {state}) in {public(self.run)}: {is_it}, "
            f"similarity {self.similarity:.4f}, copies are looked for above {self.threshold:.4f}"
        )


def look(config: Config) -> list[Answer]:
    """Says whether `curate.query` is like something in `curate.against`, else in the recipe's
    own run, and writes a picture of both; needs no Ray.

    Raises:
        PipelineError: the image cannot be read, or nothing was curated there.
    """
    folder = RunFolder.of(config.run.folder, config.run.name)
    query = config.curate.query
    encoded = _read(query)
    runs = earlier_runs(config.curate.against or str(folder.uri or folder.path))
    pixels = _pixels(config, encoded, from_json(runs[0].result.get("value_range")) or FULL)
    answers: list[Answer] = []
    for one in runs:
        answers += _like(config, one, pixels)
    answers.sort(key=lambda answer: -answer.similarity)
    alike = [answer for answer in answers if answer.alike]
    for answer in alike[:SAID]:
        result_line("query", f"{public(query)} is like {answer.line()}")
    if len(alike) > SAID:
        result_line("query", f"and {len(alike) - SAID:,} more")
    if not alike:
        nearest = f"; the nearest is {answers[0].line()}" if answers else ""
        result_line("query", f"{public(query)} is like nothing in the set{nearest}")
    if answers:
        place = folder.path / "curate" / "query.png"
        with atomic(place) as temporary:
            _both(pixels, answers[0]).save(temporary, "PNG")
        result_line("picture", str(place))
    return answers


def _read(query: str) -> bytes:
    try:
        return read_bytes(*resolve_uri(absolute_uri(query)))
    except FileNotFoundError:
        raise DataError(f"curate.query={public(query)}: there is no such file") from None
    except (IsADirectoryError, OSError) as error:
        raise DataError(f"curate.query={public(query)} cannot be read: {error}") from error


def _pixels(config: Config, encoded: bytes, value_range: ValueRange) -> Any:
    channels, most = config.model.in_channels, config.data.max_image_pixels
    try:
        return decode_image(encoded, channels, most, value_range)
    except BadImage as error:
        raise DataError(
            f"curate.query={public(config.curate.query)} is no usable image: {error.reason}",
            error.detail,
        ) from error


def _like(config: Config, one: Earlier, pixels: Any) -> list[Answer]:
    threshold = one.result["threshold"]
    if threshold is None:
        raise DataError(
            f"{public(one.run)} was curated without looking for copies",
            "curate it with dedup.enabled=true",
        )
    index = Index.open(one.root)
    name = str(one.result["copy_embedder"])
    spec = embedder_of(config, "curate.copy_embedder", name)
    if spec.identity[:2] != one.result["embedder"][:2]:
        raise DataError(
            f"{name} has changed since {public(one.run)} was curated", "curate it again"
        )
    check_inputs(one, spec)
    if spec.kind == DESCRIPTOR:
        vector, crops = describe(three_channels(pixels))
        views = visiting
    else:
        embedder = open_embedder(spec)
        vector, crops, views = unit_vectors(embedder, [embedder.prepare(pixels)])[0], None, None
    matches = look_up(index, vector, crops, views, threshold=max(0.0, threshold - NEAR))
    return [_answer(one, match.row, match.similarity, threshold) for match in matches]


def _answer(one: Earlier, row: int, similarity: float, threshold: float) -> Answer:
    folder, prints = (str(join(one.root, name)) for name in ("decisions", "fingerprint"))
    for name in parquet_names(folder):
        decisions = read_table(folder, name, filters=[("row", "=", row)]).to_pylist()
        if decisions:
            (about,) = read_table(
                prints, name, ["row", "source", "thumbnail"], [("row", "=", row)]
            ).to_pylist()
            path, thumbnail = about["source"] or "", about["thumbnail"] or b""
            return Answer(one.run, similarity, threshold, decisions[0], path, thumbnail)
    raise DataError(f"{public(one.run)} has no decision on row {row}", "curate it again")


def _both(pixels: Any, answer: Answer) -> Image.Image:
    """The image that was asked for beside the one that is most like it."""
    page = Image.new("RGB", (2 * SHOWN_SIDE + 3 * GAP, SHOWN_SIDE + 2 * GAP + 3 * LINE), "white")
    other = (
        Image.open(io.BytesIO(answer.thumbnail)).convert("RGB")
        if answer.thumbnail
        else Image.new("RGB", (SHOWN_SIDE, SHOWN_SIDE), "lightgrey")
    )
    mine = Image.fromarray(three_channels(pixels))
    for place, image in enumerate((mine, other)):
        scale = SHOWN_SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        page.paste(image.resize(size), (GAP + place * (SHOWN_SIDE + GAP), GAP))
    draw = ImageDraw.Draw(page)
    what = answer.decision
    lines = [
        f"similarity {answer.similarity:.4f}, threshold {answer.threshold:.4f}: "
        + ("alike" if answer.alike else "not alike"),
        f"{what['image_id']}: {'kept' if what['kept'] else what['reason']}",
        shortened(answer.path or what["source"], 100),
    ]
    for number, line in enumerate(lines):
        draw.text((GAP, SHOWN_SIDE + 2 * GAP + number * LINE), line, fill="black")
    return page
