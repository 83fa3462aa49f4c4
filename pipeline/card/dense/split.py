"""Which images heads are fitted to, and which are scored.

Shapes: n images, S side in pixels, h x w patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.card.dense.sets import MASKS, DenseSet
from pipeline.errors import DataError
from pipeline.uri import public

HELD_OUT = 0.2  # of a set without queries, by a hash of the images


@dataclass(frozen=True)
class DenseSettings:
    """What dense scores depend on beside model and images.

    Attributes:
        size: S, of the images; None: the model's own.
        reference_images: at most so many are fitted to, chosen by a hash, so that all models get
            the same. In memory are n x h x w x D x 2 bytes of patches.
        memory_patches: patches of the references that can vote in context; Hummingbird has ten
            million.
        batch_size: images at once.
        seed: of what is drawn: batches, patches that vote, first weights of depth heads.
        gpu: compute on a GPU of the cluster.
    """

    size: int | None = None
    reference_images: int = 2048
    memory_patches: int = 65_536
    batch_size: int = 32
    seed: int = 0
    gpu: bool = False


@dataclass(frozen=True)
class Split:
    """What is fitted to and what is scored.

    Attributes:
        reference: the set of `rows`.
        rows: of the reference, that are fitted to.
        queries: the set of `asked`.
        asked: rows of the queries.
        class_ids: of both sets, the id of each class number.
    """

    reference: DenseSet
    rows: list[int]
    queries: DenseSet
    asked: list[int]
    class_ids: tuple[int, ...]

    @classmethod
    def of(cls, dense: DenseSet, queries: DenseSet | None, settings: DenseSettings) -> Split:
        """No image is fitted to and scored.

        Raises:
            DataError: the sets do not fit each other, or too little is left.
        """
        asked_of = queries or dense
        if dense.targets != asked_of.targets or dense.void != asked_of.void:
            what = (
                f"{' and '.join(dense.targets)} with void {list(dense.void)}, "
                f"{public(asked_of.uri)} {' and '.join(asked_of.targets)} with void "
                f"{list(asked_of.void)}"
            )
            raise DataError(
                f"{public(dense.uri)} has {what}", "evaluate.dense_queries needs the same targets"
            )
        keys = [bytes(one) for one in dense.ids]
        order = sorted(range(len(keys)), key=keys.__getitem__)  # by the hash of their bytes
        if queries is None:
            asked_keys = {key for key in keys if int.from_bytes(key[:8], "big") < HELD_OUT * 2**64}
            asked = [row for row in order if keys[row] in asked_keys]
            if not asked and len(set(keys)) > 1:
                asked_keys = {keys[order[0]]}
                asked = [row for row in order if keys[row] in asked_keys]
        else:
            asked_keys, asked = {bytes(one) for one in queries.ids}, list(range(len(queries.rows)))
        rows = [row for row in order if keys[row] not in asked_keys][: settings.reference_images]
        if not rows or not asked:
            raise DataError(
                f"{public(dense.uri)} leaves {len(rows):,} images to fit to and {len(asked):,} to "
                "score that are not the same",
                "give more images, or others as evaluate.dense_queries",
            )
        class_ids = tuple(sorted({*dense.class_ids, *asked_of.class_ids}))
        if MASKS in dense.targets and len(class_ids) < 2:
            raise DataError(
                f"the masks of {public(dense.uri)} hold one class only ({class_ids[0]})",
                "a score needs two; ids that are no class are named by evaluate.void",
            )
        return cls(dense, sorted(rows), asked_of, sorted(asked), class_ids)

    @property
    def ids(self) -> npt.NDArray[np.uint8]:
        """Of the images that are scored."""
        return self.queries.ids[self.asked]

    @property
    def unseen(self) -> list[str]:
        """Ids of classes that no mask of the reference has: their IoU is 0."""
        return [str(one) for one in self.class_ids if one not in self.reference.class_ids]

    @property
    def details(self) -> dict[str, Any]:
        """How many images a score is of, and fitted to."""
        return {"images": len(self.asked), "reference_images": len(self.rows)}
