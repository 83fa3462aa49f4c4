"""A map of the images in two dimensions: alike ones are close, coloured by what became of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.curate.report.read import TableFiles, parquet_names
from pipeline.curate.rows.tables import matrix, read_table

GRID = (24, 14)  # cells of the map that may hold a picture
LEAST = 3  # rows with vectors that make a map

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Map:
    """Places of a sample of rows.

    Attributes:
        method: PCA or UMAP.
        places: [n, 2] from 0 to 1, y upwards.
        rows: of each place.
        reasons: of each place.
        explained: share of the variance that a PCA's two axes hold; 0 with UMAP.
        pictures: one row for each cell of a grid that holds any: (column, line from the top, row).
    """

    method: str
    places: Floats
    rows: tuple[int, ...]
    reasons: tuple[str, ...]
    explained: float
    pictures: tuple[tuple[int, int, int], ...]

    @property
    def shown(self) -> Iterator[int]:
        """Rows that are shown."""
        return (row for _, _, row in self.pictures)


def read_map(tables: TableFiles, sample: Sequence[tuple[int, str]], seed: int) -> Map | None:
    """Descriptors of the sampled rows, file by file, laid out flat; None where there are too few.

    Args:
        tables: of the run.
        sample: rows and their reasons, in an order that does not depend on that of the rows.
        seed: of UMAP.
    """
    folder, column = tables.folders.get("fingerprint", ""), "descriptor"
    if not folder:
        return None
    place_of = {row: place for place, (row, _) in enumerate(sample)}
    vector_of: dict[int, np.ndarray[Any, Any]] = {}
    rows = np.array(sorted(place_of), np.int64)
    for name in parquet_names(folder):
        table = read_table(folder, name, ["row", column])
        numbers = table["row"].to_numpy()
        mine = np.flatnonzero(np.isin(numbers, rows))
        if len(mine):
            width = table.schema.field(column).type.list_size
            vectors_there = matrix(table[column], width)[mine]
            vector_of |= dict(zip(numbers[mine].tolist(), vectors_there, strict=True))
    kept = [(row, reason) for row, reason in sample if row in vector_of and vector_of[row].any()]
    if len(kept) < LEAST:
        return None
    points = np.stack([vector_of[row] for row, _ in kept]).astype(np.float64)
    places, explained = principal(points)
    method = "PCA"
    if importlib.util.find_spec("umap") and len(kept) > 50:
        places, method, explained = _umap(points, seed), "UMAP", 0.0
    places = _spread(places)
    return Map(
        method=method,
        places=places,
        rows=tuple(row for row, _ in kept),
        reasons=tuple(reason for _, reason in kept),
        explained=explained,
        pictures=_pictures(places, [row for row, _ in kept]),
    )


def principal(points: Floats) -> tuple[Floats, float]:
    """The first two principal components [n, 2], and the share of the variance they hold.

    The sign of a component is that of its largest loading, so it does not change from run to run.
    """
    centred = points - points.mean(0)
    values, directions = np.linalg.eigh(centred.T @ centred)
    directions = directions[:, ::-1][:, :2]
    strongest = np.take_along_axis(directions, np.abs(directions).argmax(0)[None], 0)
    total = float(values.sum())
    share = float(values[::-1][:2].sum() / total) if total > 0 else 0.0
    return centred @ (directions * np.sign(strongest)), share


def _umap(points: Floats, seed: int) -> Floats:
    import umap

    fitted = umap.UMAP(n_components=2, metric="cosine", random_state=seed, n_jobs=1)
    places: Floats = np.asarray(fitted.fit_transform(points.astype(np.float32)), np.float64)
    return places


def _spread(places: Floats) -> Floats:
    """From 0 to 1 on each axis; outliers beyond the outer 0.5 % lie on the edge."""
    low, high = np.percentile(places, [0.5, 99.5], axis=0)
    wide = np.where(high - low > 1e-12, high - low, 1.0)
    inside: Floats = np.clip((places - low) / wide, 0, 1)
    return inside


def _pictures(places: Floats, rows: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """For each cell of the grid the row nearest to its middle."""
    columns, lines = GRID
    grid = np.array([columns, lines])
    scaled = np.stack([places[:, 0], 1 - places[:, 1]], 1) * grid
    cells = np.minimum(scaled.astype(np.int64), grid - 1)
    away = ((scaled - cells - 0.5) ** 2).sum(1)
    best: dict[tuple[int, int], int] = {}
    for i in np.argsort(away, kind="stable"):
        best.setdefault((int(cells[i, 0]), int(cells[i, 1])), int(i))
    return tuple((x, y, rows[i]) for (x, y), i in sorted(best.items()))
