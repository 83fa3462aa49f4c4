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
        images: files and rows; 0 where archives hide them, or names.
        size: bytes.
        classes: names of the folders that are classes; none where there are no labels.
        classes_why: why folders of doubtful names are classes all the same; "" where none are.
        no_classes: why folders that are there are taken for no classes; "" where it is not so.
        labels_elsewhere: labels are in columns or archives: whether there are any shows later.
        together: which parts of a set are all trained on; "" where there are none.
        beside: parts of the named folder that are not used, as (place, why).
        unnamed: files without an image's ending, where some begin like an image.
        example: the name of such a one.
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
    unnamed: int = 0
    example: str = ""
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
        places = (self.source, self.queries)
        if not self.queries or any(is_uri(x) or x.startswith(BUILTIN) for x in places):
            return False
        trained, scored = Path(self.source).resolve(), Path(self.queries).resolve()
        return scored.is_relative_to(trained) or trained.is_relative_to(scored)

    @property
    def hidden(self) -> str:
        """What hides the number of images, where it is 0."""
        return "files without an image's ending" if self.unnamed else "archives"

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
    unnamed, example = _unnamed(source, config.data.follow_links)
    others = _others(source, config.data.follow_links, unnamed > 0)
    local = not source.startswith(BUILTIN) and not is_uri(source)
    # a list of files alone, none of which is an image by its name or begins like one
    names_alone = local and known.files == () and known.labels.kind != "unknown"
    if names_alone and not known.images and not unnamed:
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
        unnamed=unnamed,
        example=example,
        labels_elsewhere=known.labels.kind in ("numbers", "unknown"),
        together=parts.together,
        beside=parts.beside,
        others=others,
        sides=sample.sides,
        megapixels=sample.megapixels,
        formats=sample.formats,
        bad=sample.bad,
    )


def _others(source: str, follow_links: bool, opened: bool) -> tuple[tuple[str, str], ...]:
    """What is left alone; not the files without an image's ending where pack takes some of them."""
    if source.startswith(BUILTIN):
        return ()
    listing = list_source(absolute_source(source), follow_links=follow_links)
    kept = [(one.source, one.reason) for one in listing.others]
    kept += [(one.source, one.reason) for one in listing.refused]
    names = [one.path for one in listing.entries if not claims_images(one.path)]
    kept += [(name, "no_image") for name in names if not opened]
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


def _unnamed(source: str, follow_links: bool) -> tuple[int, str]:
    """How many local files have no image's ending, and the first of a sample that begins like an
    image all the same: pack takes it. (0, "") where none of the sample does.
    """
    if source.startswith(BUILTIN) or is_uri(source):
        return 0, ""
    listing = list_source(absolute_source(source), follow_links=follow_links)
    paths = [entry.path for entry in listing.entries if not claims_images(entry.path)]
    for path in paths[:: max(1, len(paths) // SAMPLE)][:SAMPLE]:
        try:
            with (Path(listing.root) / path).open("rb") as file:
                if begins_like_an_image(file.read(HEAD)):
                    return len(paths), PurePosixPath(path).name
        except OSError:
            continue
    return 0, ""
