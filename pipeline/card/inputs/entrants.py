"""Contenders as tasks of scores get them: a name, and where the vectors are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.card.card import BASELINES, Role
from pipeline.card.inputs.sets import Sets
from pipeline.card.inputs.stored import column_of, mean_of
from pipeline.card.inputs.tables import Tables
from pipeline.embed.ids import Ids, id_bytes
from pipeline.embed.vectors import VectorSet
from pipeline.evaluate.features import LabelledFeatures
from pipeline.shards.classes import Classes

OUTPUTS: dict[Role, str] = {"raw_pixels": "pixels", "colours": "colours"}


@dataclass(frozen=True)
class Entrant:
    """One contender whose vectors are scored; small, sent to tasks.

    Attributes:
        role: `model`, or which baseline.
        name: for people.
        of: the name of the model that a baseline belongs to, else "".
        tables: where its vectors are.
        output: their column.
        classes: that labels of both sets are counted in.
    """

    role: Role
    name: str
    of: str
    tables: Tables
    output: str
    classes: Classes

    @property
    def is_network(self) -> bool:
        """Whether its vectors are of a network, not of the images alone."""
        return self.role not in OUTPUTS

    @property
    def both(self) -> tuple[LabelledFeatures, LabelledFeatures | None]:
        """Rows of the set that votes and of the one that is asked, where there is one. Those of a
        large table stay in it (`stored.py`).

        Pixels come without what is the same in all images of the reference: the mean would make all
        cosines 1.
        """
        reference, queries = self.tables.reference, self.tables.queries
        centre = mean_of(reference, self.output) if self.output == "pixels" else None
        rows = self._labelled(reference, column_of(reference, self.output, centre))
        if queries is None:
            return rows, None
        return rows, self._labelled(queries, column_of(queries, self.output, centre))

    def labels(self, vectors: VectorSet) -> LabelledFeatures:
        """Labels and ids of a table, without its vectors."""
        import torch

        return self._labelled(vectors, torch.zeros(vectors.rows, 0))

    def _labelled(self, vectors: VectorSet, features: object) -> LabelledFeatures:
        import torch

        table = vectors.columns("image_id", "label")
        own = np.array(table["label"].fill_null(-1).to_numpy(), np.int64)
        names = tuple(vectors.facts.get("class_names", ()))
        labels = torch.from_numpy(self.classes.mapped(own, names, vectors.uri))
        ids = Ids(id_bytes(table["image_id"])).digests()
        return LabelledFeatures(features, labels, ids)  # type: ignore[arg-type]


def entrants_of(tables: Sequence[Tables], sets: Sets) -> list[Entrant]:
    """All contenders that have vectors: networks, then what needs none."""
    classes = sets.classes
    networks = [
        Entrant(one.network.role, one.network.name, one.network.of, one, "cls", classes)
        for one in tables
    ]
    plain = []
    for role, output in OUTPUTS.items():
        holder = next((one for one in tables if output in one.reference.outputs), None)
        if holder is not None:
            plain.append(Entrant(role, BASELINES[role], "", holder, output, classes))
    return networks + plain
