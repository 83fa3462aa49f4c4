"""Which recipe fits a folder and a machine, and why: adapt, small, or a ViT-S/14.

The base is a recipe of `configs/`; what the folder and the machine ask for is laid over it, a line
with a reason each. Thresholds are rules of thumb: what was measured says each recipe of `configs/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.adapt.recipe import Line, Recipe, is_set
from pipeline.config.config import Config
from pipeline.config.load import RECIPES, read_recipe
from pipeline.errors import DataError
from pipeline.stages.console.closing import typed
from pipeline.start.folder import Folder
from pipeline.start.machine import Surroundings
from pipeline.start.reasons import REASONS

FEWEST = 100  # images, below which random weights learn nothing that is worth a run
FOR_A_VIT = 5_000  # images; a ViT has less built in than a convolutional network (ViT, section 3.1)
PILE = 2_000  # unlabelled images, among which copies are likely
SMALL_SIDE = 64  # pixels of the shorter side, below which crops of 96 enlarge most images
VECTORS = 500_000  # images; the vectors of more are made when they are asked for
LARGE_STEPS = 100_000  # images, from which a step may have 1,024 of them
VIT_VIEWS = 40_000_000  # images seen: the passes over few and over many images, within bounds
VIT_PASSES = (100, 400)
FEW_FILES = 10_000  # images, of which a share of bad ones is a handful


@dataclass(frozen=True)
class Choice:
    """A recipe, and why it is this one.

    Attributes:
        name: adapt, small or vits14: the recipe of `configs/` that is its base.
        why: in a sentence.
        recipe: fields with values and reasons.
        config: the user's fields, with the recipe applied.
        asked: the user's fields alone.
    """

    name: str
    why: str
    recipe: Recipe
    config: Config
    asked: Config


class Lines:
    """Fields as they are decided; what the user has set stays."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.by_field: dict[str, Line] = {}

    def take(self, field: str, value: Any, reason: str) -> None:
        """Decides a field, in place of what was decided before."""
        if is_set(self.config, field):
            section, _, name = field.partition(".")
            yours = getattr(getattr(self.config, section), name)
            if field != "data.source":
                value = list(yours) if isinstance(yours, tuple) else yours
                reason = "as you set it"
        self.by_field[field] = Line(field, value, reason, "images")

    def choice(self, name: str, why: str) -> Choice:
        """With all that was decided.

        Raises:
            ConfigError: values of the user do not fit it.
        """
        recipe = Recipe(tuple(self.by_field.values()))
        return Choice(name, why, recipe, _with(self.config, recipe), self.config)


def _with(config: Config, recipe: Recipe) -> Config:
    """The recipe with the user's fields; the source is the split that was chosen."""
    source = recipe.value("data.source")
    data = config.data.model_copy(update={"source": source})
    return recipe.applied(config.model_copy(update={"data": data}))


def choose(config: Config, folder: Folder, around: Surroundings) -> Choice:
    """The recipe, before its length and its batches are fitted to the machine.

    Args:
        config: what the user set: images, weights, fields.
        folder: the images.
        around: the machine.

    Raises:
        DataError: too few images for random weights, and no weights.
    """
    lines = Lines(config)
    gpu = bool(around.machine.gpus) and config.train.device != "cpu"
    if config.model.init:
        name, why = "adapt", "you name weights: training goes on from them"
        _images(lines, folder)
        lines.take("model.init", config.model.init, "the weights to begin with")
        lines.take("adapt.enabled", True, "rates, batch, length and heads follow from the weights")
    elif 0 < folder.images < FEWEST:
        raise DataError(
            f"{folder.source} has {folder.images} images: too few for anything but adaptation "
            f"(random weights need {FEWEST} at least, and learn little from some hundreds)",
            "get released weights and name them: "
            f"{typed('start', config.data.source, 'weights=FILE')} (docs/adapt.md)",
        )
    elif gpu and folder.images >= FOR_A_VIT and (folder.side or 224) >= SMALL_SIDE:
        name = "vits14"
        why = f"{folder.images:,} images and a GPU are enough for a ViT-S/14"
        _images(lines, folder)
        _base(lines, "vits14")
        _vit(lines, folder)
    else:
        name, why = "small", _why_small(folder, gpu)
        _images(lines, folder)
        _base(lines, "small")
        _small(lines, folder)
    _uses(lines, folder)
    return lines.choice(name, why)


def _why_small(folder: Folder, gpu: bool) -> str:
    if not folder.images:
        return (
            f"{folder.hidden} hide the number of images: the smallest recipe that learns something"
        )
    if not gpu:
        return (
            f"{folder.images:,} images and no GPU: a small residual network learns in minutes to "
            "hours"
        )
    if folder.images < FOR_A_VIT:
        return f"below {FOR_A_VIT:,} images a residual network is safer (a rule of thumb)"
    return f"images of {folder.side} pixels have few patches for a ViT"


def _images(lines: Lines, folder: Folder) -> None:
    take = lines.take
    take("data.source", folder.source, _what(folder))
    if folder.queries:
        why = f"a set beside it: its images are classified by those of {folder.source}"
        take("evaluate.queries", folder.queries, why)
    if folder.no_classes:
        take("data.labels", "none", folder.no_classes)
    if 0 < folder.images < FEW_FILES:
        take("data.max_bad_fraction", 0.1, "broken files are listed and left out, up to a tenth")
    if not folder.labelled and folder.images >= PILE:
        take("curate.preset", "dedup", "a pile without classes: copies, blanks and junk go first")
    elif folder.images:
        kind = "sorted into classes" if folder.labelled else "few"
        why = f"{kind}: nothing is taken away; dedup takes near-copies, blanks and junk first"
        take("curate.preset", "", why)


def _what(folder: Folder) -> str:
    number = f"{folder.images:,} images" if folder.images else folder.hidden
    if folder.classes:
        return f"{number}; their {len(folder.classes)} classes serve the evaluation alone"
    return number if folder.labels_elsewhere else f"{number}, no classes"


def _base(lines: Lines, name: str) -> None:
    """All that a recipe of `configs/` says."""
    for section, fields in read_recipe(str(RECIPES / f"{name}.yaml")).items():
        if not isinstance(fields, dict):
            continue
        for key, value in fields.items():
            field = f"{section}.{key}"
            lines.take(field, value, REASONS.get(field, f"as configs/{name}.yaml"))


def _small(lines: Lines, folder: Folder) -> None:
    take = lines.take
    if folder.side and folder.side < SMALL_SIDE:
        side = 32 if folder.side >= 32 else max(16, folder.side // 4 * 4)
        take("augment.global_size", side, f"the images have {folder.side} pixels")
        encoder = "module:pipeline.model.encoders.residual:small"
        take("model.encoder", encoder, "of CIFAR-10's recipe, for images as small")
    base = int(lines.by_field["optim.global_batch_size"].value)
    batch = min(base, 2 ** int(math.log2(folder.images / 4))) if folder.images else base
    if batch != base:
        why = f"a pass over {folder.images:,} images has 4 steps or more"
        take("optim.global_batch_size", batch, why)


def _vit(lines: Lines, folder: Folder) -> None:
    take = lines.take
    batch = 1024 if folder.images >= LARGE_STEPS else 256
    why = f"{LARGE_STEPS:,} images or more: as configs/vits14.yaml"
    if batch == 256:
        why = "few images: more steps a pass; the rate follows the batch"
    take("optim.global_batch_size", batch, why)
    low, high = VIT_PASSES
    passes = min(high, max(low, round(VIT_VIEWS / folder.images)))
    why = f"{VIT_VIEWS // 10**6} million images seen, but {low} to {high} passes; not measured"
    take("optim.passes", passes, why)
    if folder.images < LARGE_STEPS:
        prototypes = 2 ** round(math.log2(max(2048, folder.images / 4)))
        why = "one for 4 images, 2,048 at least; 65,536 are for a million"
        take("head.prototypes", prototypes, why)
    else:
        value = lines.by_field["head.prototypes"].value
        take("head.prototypes", value, "as configs/vits14.yaml: for a million images")


def _uses(lines: Lines, folder: Folder) -> None:
    if folder.images <= VECTORS:
        lines.take("embed.enabled", True, "a vector of each image, in parquet")
        lines.take("search.enabled", True, "a page with the neighbours of some images")
