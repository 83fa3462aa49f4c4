"""Whether images are read as the weights of `model.init` know them: their values, mean, deviation.

Weights that see other values than in their own training score too low at the start, and part of
what training gains is then getting used to these values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path

from pipeline.config.config import Config
from pipeline.embed.load import LOCAL_DIR, TIMM, known_run, preprocessing_beside, weights_at
from pipeline.errors import ConfigError
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import value_span
from pipeline.images.preprocessing import Preprocessing
from pipeline.images.value_range import AUTO, FULL, ValueRange, range_of, sentence, shown, similar
from pipeline.shards.set_range import ranged, used_values
from pipeline.shards.shard_set import ShardSet
from pipeline.stages.checks.known_sets import KnownSet
from pipeline.storage.places import absolute_uri
from pipeline.storage.run_folder import RunFolder
from pipeline.train.checkpoint import state
from pipeline.uri import is_uri, public

FILES = 16  # of a source that is not packed, whose values are looked at
COST = "Scores at the start are too low for it, and part of a gain is getting used to it"
ALIKE = 1e-3  # means and deviations that differ by less are the same ones


@dataclass(frozen=True)
class Known:
    """How the images of a training were read.

    Attributes:
        images: mean, deviation, values; what nobody says is empty.
        ours: of a run of ours, whose range of values is known whatever it is.
    """

    images: Preprocessing
    ours: bool = False


def known_of(init: str) -> Known:
    """What a run's plan, the files beside weights, or timm say of the images of their training.

    Args:
        init: as `model.init` takes it; of what is not there nothing is known.

    Raises:
        PipelineError: a file beside the weights is damaged.
    """
    if init.startswith(TIMM) and LOCAL_DIR not in init:
        from pipeline.model.foreign import usual_images

        return Known(usual_images(init.removeprefix(TIMM)))
    init = absolute_uri(init.removeprefix(TIMM).removeprefix(LOCAL_DIR))
    if run := known_run(init):
        return Known(run[2], ours=True)
    path = weights_at(init)
    if is_uri(path) or not Path(path).exists():
        return Known(Preprocessing())
    return Known(preprocessing_beside(path))


@dataclass(frozen=True)
class DeepImages:
    """Images of more than 8 bits of a set.

    Attributes:
        used: values that they use.
        read_with: values that become 0 to 255.
        sampled: some files of a source that is not packed show it: others may go beyond.
    """

    used: ValueRange
    read_with: ValueRange
    sampled: bool = False

    def may_fit(self, known: ValueRange) -> bool:
        """Whether the whole set may use a range, where some files use no more of it."""
        return self.sampled and _within(self.used, known)


def deep_images(config: Config, images: KnownSet | ShardSet) -> DeepImages | None:
    """Those of a set, as a recipe reads them; None where there are none.

    Of a source that is not packed it is what some of its files show.
    """
    channels, setting = config.model.in_channels, config.data.range
    shards = images.shards if isinstance(images, KnownSet) else images
    if shards is not None:
        shards = ranged(shards, setting, channels)
        used = used_values(shards, channels)
        return used and DeepImages(used, shards.columns.value_range)
    assert isinstance(images, KnownSet)
    used = _used_by_files([path for path, _ in images.files or ()], channels)
    sampled = len(images.files or ()) > FILES
    return used and DeepImages(used, used if setting == AUTO else setting, sampled)


def _within(one: ValueRange, other: ValueRange) -> bool:
    return other == FULL or (one != FULL and other[0] <= one[0] and one[1] <= other[1])


def _used_by_files(files: Sequence[str], channels: int) -> ValueRange | None:
    spans = []
    for path in files[:: max(1, len(files) // FILES)][:FILES]:
        try:
            spans.append(value_span(Path(path).read_bytes(), channels))
        except (BadImage, OSError):
            continue  # the pack says it
    deep = [span for span in spans if span is not None and span.bits]
    return range_of(deep) if deep else None


def check_weights(config: Config, folder: RunFolder, images: KnownSet | ShardSet) -> list[str]:
    """Refuses weights whose images had other values than these, where the recipe does not say that
    it means to; gives a sentence for whatever else is read otherwise than in their training.

    A run that has begun no longer reads them, and is not asked again.

    Args:
        config: the recipe.
        folder: of the run.
        images: that are trained on.

    Raises:
        ConfigError: the values are others.
    """
    init = config.model.init
    if not init or state.latest(folder.checkpoints) is not None:
        return []
    known, deep = known_of(init), deep_images(config, images)
    said = _normalised_otherwise(config, known.images)
    theirs = known.images.value_range
    if deep is None:
        return said
    ours, named = deep.read_with, config.data.range != AUTO
    if theirs == FULL:  # so says a run on 8 bits, too, and an export that notes no range
        if not known.ours:
            return said
        if named:
            return [*(_cut_off(deep, init) if ours == FULL else []), *said]
        return [*([] if similar(ours, FULL) else [_eight_or_sixteen(init, ours)]), *said]
    if similar(ours, theirs):
        return [*_cut_off(deep, init), *said] if named else said
    if not named and deep.may_fit(theirs):
        return [_perhaps_darker(deep, init, theirs), *said]
    if not named:
        raise ConfigError(
            f"model.init={public(init)} was trained with data.range={shown(theirs)}, and these "
            f"images would be read with {shown(ours)}: its features of them would mean nothing",
            f"set data.range={shown(theirs)} to read them as it does, or "
            f"data.range={shown(ours)} if these values mean the same",
        )
    values = (
        f"model.init={public(init)} was trained with data.range={shown(theirs)}, and the recipe "
        f"reads these images with data.range={shown(ours)}. {COST}"
    )
    return [values, *said]


def _cut_off(deep: DeepImages, init: str) -> list[str]:
    """A sentence where images are read as the weights know them, and use other values."""
    narrower = deep.sampled and deep.read_with != FULL and _within(deep.used, deep.read_with)
    if narrower or similar(deep.used, deep.read_with):
        return []
    return [
        f"{sentence(deep.used, deep.read_with)}. This range is that of model.init={public(init)}; "
        f"set data.range={shown(deep.used)} if its values mean the same here"
    ]


def _perhaps_darker(deep: DeepImages, init: str, theirs: ValueRange) -> str:
    return (
        f"some of these images use values {shown(deep.used)}, and model.init={public(init)} was "
        f"trained with data.range={shown(theirs)}. If all use no more, the job stops once they are "
        f"packed; set data.range={shown(theirs)} to read them as it does"
    )


def _eight_or_sixteen(init: str, ours: ValueRange) -> str:
    return (
        f"model.init={public(init)} was trained on images of 8 bits, or on 16 bits with "
        f"data.range=full, and these images are read with {shown(ours)}. If it had 16 bits, set "
        "data.range=full: else scores at the start are too low"
    )


def _normalised_otherwise(config: Config, known: Preprocessing) -> list[str]:
    """A sentence where the recipe has another mean or deviation."""
    pairs = {
        "augment.mean": (known.mean, config.augment.mean),
        "augment.std": (known.std, config.augment.std),
    }
    others = {
        field: pair
        for field, pair in pairs.items()
        if len(pair[0]) == len(pair[1])  # other numbers of channels do not fit, which is said
        and not all(isclose(a, b, rel_tol=0, abs_tol=ALIKE) for a, b in zip(*pair, strict=True))
    }
    if not others:
        return []
    theirs, ours = (
        " ".join(f"{field}={_numbers(pair[i])}" for field, pair in others.items()) for i in (0, 1)
    )
    init = public(config.model.init)
    return [f"model.init={init} was trained with {theirs}, and the recipe has {ours}. {COST}"]


def _numbers(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:.4g}' for value in values)}]"
