"""The labelled sets of an evaluation: which they are, and what is to be said of them."""

from __future__ import annotations

from pipeline.config.config import Config
from pipeline.evaluate.labels import Labels, check_deciding, check_keep, check_labels
from pipeline.shards.overlap import overlap_of, shared_images
from pipeline.shards.shards import ShardSet, open_shards

NamedSet = tuple[str, ShardSet]  # what a set is called, and the set
TRAINING_SHARDS = "data.shards"
KEEP = "guard.keep"


def evaluation_sets(config: Config, shards: ShardSet) -> tuple[NamedSet, NamedSet | None] | None:
    """The set that votes and the one that is classified; None where nothing has labels.

    Without `evaluate.queries` there is one set, each of whose images is classified by the others.

    Args:
        config: the recipe.
        shards: of the training, which vote where no reference is named.

    Raises:
        DataError: a set cannot be read, the two cannot be compared by their labels, or the score
            that decides needs labels that are not there.
    """
    settings, data = config.evaluate, config.data

    def opened(field: str, uri: str) -> NamedSet:
        return field, open_shards(uri, data.image_column, data.label_column, field)

    reference = (TRAINING_SHARDS, shards)
    if settings.reference:
        reference = opened("evaluate.reference", settings.reference)
    if not settings.queries:
        check_deciding(settings.decide_by, Labels.of(*reference))
        return (reference, None) if reference[1].has_labels else None
    queries = opened("evaluate.queries", settings.queries)
    check_labels(Labels.of(*queries), Labels.of(*reference))
    return reference, queries


def remarks(config: Config, shards: ShardSet) -> list[str]:
    """Sentences on what the two sets share and lack; reads their ids and labels.

    Raises:
        PipelineError: as `evaluation_sets` says, or no class is in both sets.
    """
    reference, queries = evaluation_sets(config, shards) or (None, None)
    return overlap_of(reference, queries).sentences() if reference and queries else []


def keep_set(config: Config) -> NamedSet | None:
    """The labelled images on which a training must forget nothing (`guard.keep`); None: none are.

    Raises:
        DataError: they cannot be read, or have no labels.
    """
    if not config.guard.keep:
        return None
    data = config.data
    shards = open_shards(config.guard.keep, data.image_column, data.label_column, KEEP)
    check_keep(Labels.of(KEEP, shards))
    return KEEP, shards


def keep_remarks(config: Config, shards: ShardSet) -> list[str]:
    """A sentence where images of `guard.keep` are trained on; reads the ids of both.

    Raises:
        DataError: as `keep_set` says.
    """
    keep = keep_set(config)
    if keep is None:
        return []
    shared = shared_images(keep[1], shards)
    if shared is None:
        return ["the training images are too many to look for those of guard.keep among them"]
    text = (
        f"{shared:,} of {keep[1].rows:,} images of guard.keep are also trained on, byte for byte: "
        "what is forgotten shows less on them"
    )
    return [text] * bool(shared)
