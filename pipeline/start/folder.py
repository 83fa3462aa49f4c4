"""What a place of images holds, by its list of files and the headers of a sample."""

from __future__ import annotations

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
from pipeline.stages.checks.known_sets import KnownSet
from pipeline.start.split import split
from pipeline.uri import is_uri

SAMPLE = 32  # images whose headers are read


@dataclass(frozen=True)
class Folder:
    """A place of images, before anything is packed.

    Attributes:
        source: what is trained on, as `data.source`.
        queries: the held-out set beside it; "" where there is none.
        images: files and rows; 0 where archives hide them.
        size: bytes.
        classes: names of the folders that are classes; none where there are no labels.
        classes_why: why folders of doubtful names are classes all the same; "" where none are.
        no_classes: why folders that are there are taken for no classes; "" where it is not so.
        labels_elsewhere: labels are in columns or archives: whether there are any shows later.
        together: which parts of a set are all trained on; "" where there are none.
        beside: parts of the named folder that are not used, as (place, why).
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
    classes_why: str = ""
    no_classes: str = ""
    labels_elsewhere: bool = False
    together: str = ""
    beside: tuple[tuple[str, str], ...] = ()
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
    def overlap(self) -> bool:
        """Whether the held-out set lies inside what is trained on, or the other way about."""
        if not self.queries or any(is_uri(place) for place in (self.source, self.queries)):
            return False
        trained, scored = Path(self.source).resolve(), Path(self.queries).resolve()
        return scored.is_relative_to(trained) or trained.is_relative_to(scored)

    @property
    def labelled(self) -> bool:
        """Whether there are labels, as far as it is known."""
        return bool(self.classes) or self.labels_elsewhere


def look(config: Config) -> Folder:
    """Lists `data.source` and reads the headers of a sample of it.

    Raises:
        PipelineError: nothing is there, or nothing that can be packed.
    """
    named, parts = config.data.source, split(config)
    known, source = parts.known, parts.source
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
        queries=parts.queries,
        images=known.images,
        size=known.size,
        classes=parts.classes,
        classes_why=parts.classes_why,
        no_classes=parts.no_classes,
        labels_elsewhere=known.labels.kind in ("numbers", "unknown"),
        together=parts.together,
        beside=parts.beside,
        others=others,
        sides=sample.sides,
        megapixels=sample.megapixels,
        formats=sample.formats,
        bad=sample.bad,
    )


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
