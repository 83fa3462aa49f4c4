"""Whether models know the values of the images that they are scored on."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.card.inputs.networks import Network
from pipeline.card.inputs.sets import Sets
from pipeline.errors import DataError
from pipeline.evaluate.sets import TRAINING_SHARDS
from pipeline.images.value_range import shown
from pipeline.shards.set_range import difference, other_range

log = logging.getLogger("pipeline.evaluate")


def check_ranges(sets: Sets, networks: Sequence[Network], own: bool) -> None:
    """Refuses images whose values are others than a named model was trained with; of the run's own
    model that is said, for its other sets are read as the training images are.

    Args:
        sets: of images.
        networks: that are scored.
        own: the model is the run's own.

    Raises:
        DataError: they are.
    """
    for one in sets.each.values():
        for network in networks:
            spec, channels = network.spec, len(network.spec.mean)
            assert one.shards is not None
            if network.role != "model":
                continue
            if own:
                if one.field != TRAINING_SHARDS and (
                    text := difference(
                        f"the images of {one.field}", one.shards, spec.value_range, channels
                    )
                ):
                    log.warning("%s", text)
            elif (values := other_range(one.shards, spec.value_range, channels)) is not None:
                raise DataError(
                    f"{one.labels.place} holds values of {shown(values)}, {network.name} was "
                    f"trained with {shown(spec.value_range)}: its vectors of these images would "
                    "mean nothing",
                    "take a model that was trained on such images, or say which values become 0 "
                    "and 255: data.range=[low,high]",
                )
