"""What a place of images holds, by its list of files and the headers of a sample."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from statistics import median

from pipeline.config.config import Config
from pipeline.context import BUILTIN
from pipeline.errors import DataError
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import image_format, image_size
from pipeline.images.kinds import HEAD, begins_like_an_image, claims_images
from pipeline.pack.listing import list_source
from pipeline.pack.source_places import absolute_source
from pipeline.shards.row_group import read_row_group
from pipeline.stages.checks.known_sets import KnownSet, known_set
from pipeline.uri import is_uri

SAMPLE = 32  # images whose headers are read
TRAINING = ("train", "training")
# Of the sets beside it the first: a score that chooses a checkpoint leaves the test set unseen
HELD_OUT = ("val", "valid", "validation", "test", "testing", "eval")
FEW_OF_A_CLASS = 4  # images of a folder on average, below which folders are no classes
# Folders by date, and those that cameras make (DCIM/100CANON)
NO_CLASS = re.compile(r"(19|20)\d\d([-_. ]?\d\d){0,2}|\d{1,2}|\d{3}[A-Z_]{3,5}|DCIM", re.IGNORECASE)


@dataclass(frozen=True)
class Folder:
    """A place of images, before anything is packed.

    Attributes:
        source: what is trained on, as `data.source`.
        queries: the held-out set beside it; "" where there is none.
        images: files and rows; 0 where archives hide them.
        size: bytes.
        classes: names of the folders that are classes; none where there are no labels.
        no_classes: why folders that are there are taken for no classes; "" where it is not so.
        labels_elsewhere: labels are in columns or archives: whether there are any shows later.
        others: files that are left alone, as (name, why).
        sides: shorter sides of a sample, pixels.
        megapixels: of the same.
        formats: of the same, with their numbers.
        bad: names of the sample that are no readable images, with the reason.
    """

    source: str
    queries: str
    images: int
    size: int
    classes: tuple[str, ...] = ()
    no_classes: str = ""
    labels_elsewhere: bool = False
    others: tuple[tuple[str, str], ...] = ()
    sides: tuple[int, ...] = ()
    megapixels: tuple[float, ...] = ()
    formats: dict[str, int] = field(default_factory=dict)
    bad: tuple[str, ...] = ()

    @property
    def side(self) -> int:
        """The median shorter side, pixels; 0 where no header was read."""
        return round(median(self.sides)) if self.sides else 0

    @property
    def labelled(self) -> bool:
        """Whether there are labels, as far as it is known."""
        return bool(self.classes) or self.labels_elsewhere


def look(config: Config) -> Folder:
    """Lists `data.source` and reads the headers of a sample of it.

    Raises:
        PipelineError: nothing is there, or nothing that can be packed.
    """
    named = config.data.source
    source, queries = _split(config)
    changed = {"data": config.data.model_copy(update={"source": source})}
    config = config.model_copy(update=changed)
    known = known_set(config, "data.source", source)
    if queries and not config.evaluate.queries:
        asked = known_set(config, "evaluate.queries", queries)
        if asked.labels.kind == "none" or known.labels.kind == "none":
            queries = ""
    classes, why = _classes(known.labels.names, known.images)
    if known.labels.kind != "names":
        classes, why = (), ""
    others = _others(source, config.data.follow_links)
    if _is_without_images(known, source, config.data.follow_links):
        raise DataError(
            f"no image in {named}, but {len(others):,} other files such as {others[0][0]}",
            "name a folder of images, archives or parquet",
        )
    sample = _sample(known)
    if sample.bad and not sample.sides:
        raise DataError(
            f"{named} has {known.images:,} images by their names, and none of {len(sample.bad)} "
            f"that were tried is one: {sample.bad[0]}",
            "check data.source, and look at these files",
        )
    return Folder(
        source=source,
        queries=queries,
        images=known.images,
        size=known.size,
        classes=classes,
        no_classes=why,
        labels_elsewhere=known.labels.kind in ("numbers", "unknown"),
        others=others,
        sides=sample.sides,
        megapixels=sample.megapixels,
        formats=sample.formats,
        bad=sample.bad,
    )


def _split(config: Config) -> tuple[str, str]:
    """Training images and held-out ones, where a folder has `train/` and `val/` or `test/`.

    A `train/` among other folders is no part of a set but a class: pictures of trains.
    """
    source, queries = config.data.source, config.evaluate.queries
    if source.startswith(BUILTIN) or is_uri(source) or queries or not Path(source).is_dir():
        return source, queries
    names = {path.name.lower(): path.name for path in Path(source).iterdir() if path.is_dir()}
    training = next((names[name] for name in TRAINING if name in names), "")
    held_out = next((names[name] for name in HELD_OUT if name in names), "")
    others = [name for name in names.values() if name != training and not name.startswith(".")]
    if not training or (others and not held_out):
        return source, ""
    home = source.rstrip("/")
    return f"{home}/{training}", f"{home}/{held_out}" if held_out else ""


def _classes(names: tuple[str, ...], images: int) -> tuple[tuple[str, ...], str]:
    """The names, or none of them and why."""
    if not names:
        return (), ""
    if images and images < FEW_OF_A_CLASS * len(names):
        each = images / len(names)
        return (), f"{len(names):,} folders with {each:.1f} images each are no classes"
    if all(NO_CLASS.fullmatch(name) for name in names):
        return (), f"folders such as {names[0]} are dates, numbers or a camera's, no classes"
    return names, ""


def _others(source: str, follow_links: bool) -> tuple[tuple[str, str], ...]:
    if source.startswith(BUILTIN):
        return ()
    listing = list_source(absolute_source(source), follow_links=follow_links)
    kept = [(one.source, one.reason) for one in listing.others]
    kept += [(one.source, one.reason) for one in listing.refused]
    # pack opens these, and takes what begins like an image
    names = [one.path for one in listing.entries if not claims_images(one.path)]
    kept += [(name, "no_image") for name in names]
    return tuple((PurePosixPath(name).name, reason) for name, reason in kept)


@dataclass(frozen=True)
class Sample:
    """What the headers of some images say; as in `Folder`."""

    sides: tuple[int, ...]
    megapixels: tuple[float, ...]
    formats: dict[str, int]
    bad: tuple[str, ...]


def _sample(known: KnownSet) -> Sample:
    """Of files that are spread over the list, or of the first rows of a table."""
    sides, megapixels, bad = [], [], []
    formats: Counter[str] = Counter()
    for name, encoded in _encoded(known):
        try:
            if isinstance(encoded, OSError):
                raise BadImage("unreadable", str(encoded))
            height, width = image_size(encoded)
        except BadImage as error:
            bad.append(f"{name} ({error.reason})")
        else:
            sides.append(min(height, width))
            megapixels.append(height * width / 1e6)
            formats[image_format(encoded)] += 1
    return Sample(tuple(sides), tuple(megapixels), dict(formats.most_common()), tuple(bad))


def _encoded(known: KnownSet) -> Iterator[tuple[str, bytes | OSError]]:
    """Some images, each with its name."""
    paths = [path for path, _ in known.files or ()]
    step = max(1, len(paths) // SAMPLE)
    for path in paths[::step][:SAMPLE]:
        try:
            yield Path(path).name, Path(path).read_bytes()
        except OSError as error:
            yield Path(path).name, error
    if known.shards is not None and known.shards.rows:
        file = next(i for i, shard in enumerate(known.shards.files) if shard.rows)
        group = read_row_group(known.shards, file, 0)
        for number, encoded in enumerate(group.encoded[:SAMPLE]):
            yield f"row {number}", bytes(encoded)


def _is_without_images(known: KnownSet, source: str, follow_links: bool) -> bool:
    """Whether a list of files holds none that is named as an image, and none of some that are not
    begins like one.
    """
    if known.images or known.files != () or known.labels.kind == "unknown":
        return False
    if source.startswith(BUILTIN) or is_uri(source):
        return False
    listing = list_source(absolute_source(source), follow_links=follow_links)
    for entry in listing.entries[:SAMPLE]:
        try:
            with (Path(listing.root) / entry.path).open("rb") as file:
                if begins_like_an_image(file.read(HEAD)):
                    return False
        except OSError:
            continue
    return True
