"""Copies: the steps from vectors to components, leaks and matches, each of which resumes.

find_pairs       collapse equal vectors, fit cells, write buckets, join, reduce to edges
find_leaks       evaluation sets against the buckets
find_components  edges above a threshold to components with a keeper each
find_matches     new images against the buckets of an earlier curation
look_up          one image against them, without Ray
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.curate import cells as cells_of
from pipeline.curate import collapse, components, items, join, leaks
from pipeline.curate.exact import Halves
from pipeline.curate.items import Shuffled, Visiting
from pipeline.curate.portions import CROPS, Portion, Rows, portions
from pipeline.curate.tables import InputFile, Inputs, Vectors
from pipeline.curate.work import Result, Task, run_step
from pipeline.data.storage import resolve_uri
from pipeline.data.transfer import read_json, write_bytes_atomic
from pipeline.errors import DataError
from pipeline.uri import Place, public
from pipeline.uri import join as join_place

FILE_GROUPS = 256  # tasks that write the tables of input files
STORED = "copies.json"


@dataclass(frozen=True)
class Copies:
    """What `find_pairs` left: enough to go on with, now or in a later run.

    Attributes:
        root: folder of the steps.
        rows: of the inputs.
        penalty: that the similarity of a crop is reduced by.
        cells: folder of the cells.
        buckets: how many there are.
        shuffled: the items in their buckets.
        copies: folder and tables of rows with equal vectors.
        edges: folder of `edges.parquet`.
        lowest: similarity that all edges are above.
        touched: rows that are in an edge.
        portion_rows: rows of a portion, or None.
        keys: of the steps.
        steps: their results; empty where this was read from storage.
    """

    root: str
    rows: int
    penalty: float
    cells: str
    buckets: int
    shuffled: Shuffled
    copies: tuple[str, tuple[str, ...]]
    edges: str
    lowest: float
    touched: int
    portion_rows: int | None
    keys: dict[str, str]
    steps: tuple[Result, ...] = ()

    def save(self) -> None:
        """Writes what a later run needs, with places below the folder of the steps."""
        value = asdict(self)
        del value["steps"]
        text = json.dumps(value).replace(json.dumps(self.root)[1:-1], "{root}")
        fs, path = resolve_uri(str(join_place(self.root, STORED)))
        write_bytes_atomic(text.encode(), fs, path)

    @classmethod
    def open(cls, root: Place) -> Copies:
        """Reads it.

        Raises:
            DataError: there is none.
        """
        fs, path = resolve_uri(str(join_place(root, STORED)))
        value = read_json(fs, path)
        if value is None:
            raise DataError(
                f"{public(str(root))} holds no curation with copies: {STORED} is missing",
                "name the folder of a curation that is finished and had dedup.enabled=true",
            )
        value = json.loads(json.dumps(value).replace("{root}", json.dumps(str(root))[1:-1]))
        shuffled = value["shuffled"]
        names = tuple((name, tuple(shelves)) for name, shelves in shuffled["names"])
        crops = tuple(shuffled["crops"])
        value["shuffled"] = Shuffled(**{**shuffled, "names": names, "crops": crops})
        value["copies"] = (value["copies"][0], tuple(value["copies"][1]))
        return cls(**value)


def find_pairs(
    root: Place,
    inputs: Inputs,
    vectors: Vectors,
    *,
    lowest: float,
    probes: int,
    exact: tuple[str, str] = ("", ""),
    cell_images: int | None = None,
    visiting: Visiting | None = None,
    penalty: float = 0.0,
    seed: int = 0,
    gpus: float = 0.0,
    _buckets: int | None = None,
    _portion_rows: int | None = None,
) -> Copies:
    """All pairs of images that are alike, as the edges of a maximum spanning forest.

    Args:
        root: folder of the curation that all nodes reach.
        inputs: the images.
        vectors: of them.
        lowest: similarity that pairs must be above.
        probes: cells in which an image is compared.
        exact: folder of `tables.EXACT` and key of its step: rows with another keeper are not
            joined; empty: all rows are.
        cell_images: mean images in a cell; default: what costs least.
        visiting: further items of an image with views (`descriptor.visiting`); needed where
            `vectors.views`.
        penalty: that the similarity of a crop is reduced by.
        seed: of the sample and of the cells.
        gpus: of the tasks that compare.
    """
    buckets, copies, where, steps = placed(
        root,
        inputs,
        vectors,
        exact,
        probes,
        cell_images,
        visiting,
        seed,
        gpus,
        _buckets,
        "near",
        _portion_rows,
    )
    shuffle_key = steps[-1].key
    pairs = run_step(
        root,
        "copies/pairs",
        [shuffle_key, lowest, penalty],
        [
            Task(
                f"{b:05d}",
                (where, b, lowest, penalty),
            )
            for b in range(buckets)
        ],
        join.join_task,
        gpus=gpus,
    )
    edges = run_step(
        root,
        "edges",
        [pairs.key],
        [Task("edges", (pairs.folder, [f"{b:05d}" for b in range(buckets)], copies, lowest))],
        join.edges_task,
    )
    steps = (*steps, pairs, edges)
    found = Copies(
        root=str(root),
        rows=inputs.rows,
        penalty=penalty,
        cells=next(step.folder for step in steps if step.step == "copies/cells"),
        buckets=buckets,
        shuffled=where,
        copies=copies,
        edges=edges.folder,
        lowest=lowest,
        touched=int(edges.total("touched")),
        portion_rows=_portion_rows,
        keys={step.step: step.key for step in steps},
        steps=steps,
    )
    found.save()
    return found


def placed(
    root: Place,
    inputs: Inputs,
    vectors: Vectors,
    exact: tuple[str, str],
    probes: int,
    cell_images: int | None,
    visiting: Visiting | None,
    seed: int,
    gpus: float,
    wanted_buckets: int | None,
    bucketing: str,
    portion_rows: int | None,
) -> tuple[int, tuple[str, tuple[str, ...]], Shuffled, tuple[Result, ...]]:
    """The first half of `find_pairs`: the items in their buckets.

    Returns:
        The number of buckets, folder and tables of rows with equal vectors, the items, the steps.
    """
    assert visiting is not None or not vectors.views, "views need a function that makes the items"
    of = portions(inputs.files, vectors, portion_rows)
    crops = _crops(vectors, visiting)
    steps: list[Result] = []

    def step(name: str, settings: Any, tasks: Sequence[Task], function: Any, **more: Any) -> Result:
        steps.append(run_step(root, name, settings, tasks, function, **more))
        return steps[-1]

    hashed_buckets = collapse.buckets_for(inputs.rows)
    base = [vectors.key, exact[1], inputs.digest, portion_rows]
    hashed = step(
        "copies/hashes",
        [base, hashed_buckets],
        [Task(p.name, (vectors, p, exact[0], hashed_buckets)) for p in of],
        collapse.hash_task,
    )
    names = _written(of, hashed)
    collapsed = step(
        "copies/collapse",
        [hashed.key],
        [Task(f"{b:05d}", (hashed.folder, names, b)) for b in range(hashed_buckets)],
        collapse.collapse_task,
    )
    copies = (collapsed.folder, tuple(f"{b:05d}" for b in range(hashed_buckets)))
    rows = int(collapsed.total("rows") - collapsed.total("copies"))
    cells = cells_of.cells_for(rows, probes, vectors.dim, cell_images)
    share = cells_of.sample_share(rows, cells, vectors.dim)
    sample = step(
        "copies/sample",
        [collapsed.key, seed, share],
        [Task(p.name, (vectors, p, exact[0], copies, seed, share)) for p in of],
        cells_of.sample_task,
    )
    buckets = wanted_buckets or cells_of.buckets_for(rows, vectors.dim, len(crops))
    buckets = max(1, min(buckets, cells))
    arguments = (vectors.dim, cells, buckets, seed, bucketing)
    fitted = step(
        "copies/cells",
        [sample.key, arguments],
        [Task("fit", (sample.folder, tuple(p.name for p in of), *arguments))],
        cells_of.fit_task,
        cpus=_cpus_of_fit(),
        gpus=gpus,
    )
    shuffled = step(
        "copies/shuffle",
        [fitted.key, probes, crops],
        [Task(p.name, (vectors, p, exact[0], copies, fitted.folder, probes, visiting)) for p in of],
        items.shuffle_task,
        gpus=gpus,
    )
    where = Shuffled(shuffled.folder, _written(of, shuffled), vectors.dim, probes, crops)
    return buckets, copies, where, tuple(steps)


def find_leaks(
    copies: Copies,
    inputs: Inputs,
    sets: Mapping[str, tuple[Inputs, Vectors]],
    *,
    threshold: float,
    visiting: Visiting | None = None,
    gpus: float = 0.0,
) -> tuple[Result, tuple[Result, ...]]:
    """The best match of each image among the images of evaluation sets.

    Args:
        copies: of the images.
        inputs: the images.
        sets: inputs and vectors of each evaluation set, by name.
        threshold: similarity that a match must be above.
        visiting: as for `find_pairs`.
        gpus: of the tasks that compare.

    Returns:
        The step whose folder has `tables.LEAKS` of each input file, and all steps. The account of
        `copies/leaks/queries` counts the images of each set that have a match; its folder has
        `queries.parquet` (`leaks.QUERIES`).
    """
    steps: list[Result] = []
    placed: list[tuple[str, Shuffled]] = []
    for name, (set_inputs, vectors) in sorted(sets.items()):
        result, shuffled = _shuffle(
            copies, f"copies/leaks/sets/{name}", set_inputs, vectors, visiting, gpus
        )
        steps.append(result)
        placed.append((name, shuffled))
    names = tuple(f"{b:05d}" for b in range(copies.buckets))
    hits = run_step(
        copies.root,
        "copies/leaks/hits",
        [
            copies.keys["copies/shuffle"],
            [r.key for r in steps],
            sorted(sets),
            threshold,
            copies.penalty,
        ],
        [
            Task(
                name,
                (copies.shuffled, placed, bucket, threshold, copies.penalty),
            )
            for bucket, name in enumerate(names)
        ],
        leaks.leak_task,
        gpus=gpus,
    )
    queries = run_step(
        copies.root,
        "copies/leaks/queries",
        [hits.key],
        [Task("queries", (hits.folder, names))],
        leaks.queries_task,
    )
    groups = _groups(inputs.files)
    whole = run_step(
        copies.root,
        "copies/leaks/whole",
        [hits.key, copies.keys["copies/collapse"]],
        [
            Task(
                name,
                (hits.folder, names, copies.copies, files[0].first, _end(files), name),
            )
            for name, files in groups
        ],
        leaks.copies_task,
    )
    found = run_step(
        copies.root,
        "leaks",
        [whole.key, inputs.digest],
        [Task(name, (whole.folder, [n for n, _ in groups], files)) for name, files in groups],
        leaks.spread_leaks_task,
    )
    return found, (*steps, hits, queries, whole, found)


def find_components(
    copies: Copies,
    inputs: Inputs,
    vectors: Vectors,
    *,
    fingerprints: tuple[str, str],
    threshold: float,
    guard: float,
    chains: str = "split",
    leaks: tuple[str, str] = ("", ""),
    visiting: Visiting | None = None,
) -> tuple[Result, tuple[Result, ...]]:
    """Components of copies with a keeper each.

    Args:
        copies: of the images.
        inputs: the images.
        vectors: that the copies were found with.
        fingerprints: folder of `tables.FINGERPRINT` and key of its step.
        threshold: similarity that an edge must be above; not below `copies.lowest`.
        guard: a member that is so much less like its keeper than the threshold is of a chain.
        chains: `split`: such members get keepers of their own; `keep`: one for each component.
        leaks: folder of `tables.LEAKS` and key of its step; empty: nothing leaks.
        visiting: as for `find_pairs`.

    Returns:
        The step whose folder has `tables.COMPONENTS` of each input file, and all steps.
    """
    assert threshold >= copies.lowest, "edges below were not looked for"
    root = copies.root
    of = portions(inputs.files, vectors, copies.portion_rows)
    labels = run_step(
        root,
        "copies/labels",
        [copies.keys["edges"], threshold],
        [Task("labels", (copies.edges, threshold))],
        components.label_task,
    )
    parts = components.parts_for(int(labels.total("rows")), vectors)
    gathered = run_step(
        root,
        "copies/gathered",
        [labels.key, copies.keys["copies/collapse"], fingerprints[1], leaks[1], parts],
        [
            Task(
                p.name,
                (
                    vectors,
                    p,
                    _files_of(p, inputs),
                    labels.folder,
                    copies.copies,
                    fingerprints[0],
                    leaks[0],
                    parts,
                ),
            )
            for p in of
        ],
        components.gather_task,
    )
    least = threshold - guard
    names, vector_names = (_written(of, gathered, of_) for of_ in ("shelves", "vector_shelves"))
    kept = run_step(
        root,
        "copies/kept",
        [gathered.key, least, chains, copies.penalty],
        [
            Task(
                f"{part:05d}",
                (
                    gathered.folder,
                    names,
                    vector_names,
                    part,
                    vectors.dim,
                    visiting,
                    copies.penalty,
                    least,
                    chains,
                ),
            )
            for part in range(parts)
        ],
        components.keep_task,
    )
    part_names = [f"{part:05d}" for part in range(parts)]
    found = run_step(
        root,
        "components",
        [kept.key, inputs.digest],
        [Task(name, (kept.folder, part_names, files)) for name, files in _groups(inputs.files)],
        components.spread_task,
    )
    return found, (labels, gathered, kept, found)


def find_matches(
    root: Place,
    earlier: Copies,
    inputs: Inputs,
    vectors: Vectors,
    *,
    decisions: tuple[str, Sequence[str], str],
    threshold: float,
    visiting: Visiting | None = None,
    exact: tuple[str, str] = ("", ""),
    gpus: float = 0.0,
) -> tuple[Result, tuple[Result, ...]]:
    """The best match of each new image among the kept images of an earlier curation.

    Args:
        root: folder of the new curation.
        earlier: the copies of the earlier one.
        inputs: the new images.
        vectors: of them, made as the earlier ones.
        decisions: folder, names and key of tables with `row` and `kept` of the earlier one.
        threshold: similarity that a match must be above.
        visiting: as for `find_pairs`.
        exact: as for `find_pairs`.
        gpus: of the tasks that compare.

    Returns:
        The step whose folder has `leaks.MATCHES` of each new input file, and all steps.
    """
    folder, names, key = decisions
    kept = run_step(
        root,
        "matching/kept",
        [key],
        [Task("kept", (folder, tuple(names), earlier.rows))],
        leaks.kept_task,
    )
    placed, new = _shuffle(
        earlier, "matching/shuffle", inputs, vectors, visiting, gpus, root=root, exact=exact
    )
    matched = run_step(
        root,
        "matching/buckets",
        [kept.key, placed.key, threshold, earlier.penalty],
        [
            Task(
                f"{b:05d}",
                (earlier.shuffled, kept.folder, new, b, threshold, earlier.penalty),
            )
            for b in range(earlier.buckets)
        ],
        leaks.match_task,
        gpus=gpus,
    )
    bucket_names = [f"{b:05d}" for b in range(earlier.buckets)]
    found = run_step(
        root,
        "matches",
        [matched.key, inputs.digest],
        [
            Task(name, (matched.folder, bucket_names, files))
            for name, files in _groups(inputs.files)
        ],
        leaks.spread_matches_task,
    )
    return found, (kept, placed, matched, found)


@dataclass(frozen=True)
class Match:
    """A stored image that is like the one that was looked up."""

    row: int
    image_id: str
    similarity: float


def look_up(
    copies: Copies,
    vector: Halves,
    crops: Halves | None = None,
    visiting: Visiting | None = None,
    *,
    threshold: float,
    most: int = 10,
) -> list[Match]:
    """Stored images that one image is like, the most similar first; opens the buckets of its cells.

    Rows with equal vectors are found by the one that stands for them (the smallest image id).

    Args:
        copies: of the stored images.
        vector: [d] of unit length.
        crops: [9, d] where the stored images have views.
        visiting: as for `find_pairs`.
        threshold: similarity that a match must be above.
        most: matches returned.
    """
    stored = copies.shuffled
    _check_dim(stored, len(vector), "the image")
    rows = Rows(
        np.zeros(1, np.int64),
        np.zeros((1, 16), np.uint8),
        vector[None],
        None if crops is None else crops[None],
    )
    fitted = cells_of.Cells.load(copies.cells, stored.dim)
    table, bucket, _ = items.place(rows, fitted, stored.probes, visiting)
    found: dict[int, Match] = {}
    for number in np.unique(bucket // 2):
        mine = table.filter(bucket // 2 == number)
        here = items.items_of(
            [
                (not one % 2, mine.slice(i, 1))
                for i, one in enumerate(bucket[bucket // 2 == number])
            ],
            stored.dim,
            stored.probes,
        )
        pool = stored.read(int(number))
        a, _, similarity = leaks.relative_pairs(
            pool, here, threshold, np.array(stored.crops), copies.penalty
        )
        for place, value in zip(a, similarity, strict=True):
            row = int(pool.row[place])
            if row not in found or found[row].similarity < value:
                found[row] = Match(row, bytes(pool.ids[place]).hex(), float(value))
    return sorted(found.values(), key=lambda match: (-match.similarity, match.image_id))[:most]


def _shuffle(
    copies: Copies,
    step: str,
    inputs: Inputs,
    vectors: Vectors,
    visiting: Visiting | None,
    gpus: float,
    root: Place | None = None,
    exact: tuple[str, str] = ("", ""),
) -> tuple[Result, Shuffled]:
    """Writes the items of another set to the buckets of the cells that are there."""
    stored = copies.shuffled
    _check_dim(stored, vectors.dim, step)
    of = portions(inputs.files, vectors, copies.portion_rows)
    result = run_step(
        root or copies.root,
        step,
        [copies.keys["copies/cells"], vectors.key, exact[1], stored.probes, stored.crops],
        [
            Task(
                p.name,
                (vectors, p, exact[0], ("", ()), copies.cells, stored.probes, visiting),
            )
            for p in of
        ],
        items.shuffle_task,
        gpus=gpus,
    )
    names = _written(of, result)
    return result, Shuffled(result.folder, names, vectors.dim, stored.probes, stored.crops)


def _check_dim(stored: Shuffled, dim: int, who: str) -> None:
    if dim != stored.dim:
        raise DataError(
            f"vectors of {who} have {dim} numbers, those of the curated set {stored.dim}",
            "embed both with the same curate.copy_embedder",
        )


def _written(
    of: Sequence[Portion], result: Result, which: str = "shelves"
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names of the tasks of a shuffle, with the shelves that each wrote."""
    return tuple(
        (portion.name, tuple(account[which]))
        for portion, account in zip(of, result.accounts, strict=True)
    )


def _crops(vectors: Vectors, visiting: Visiting | None) -> tuple[bool, ...]:
    if not vectors.views or visiting is None:
        return (False,)
    none = np.zeros((0, vectors.dim), np.float16)
    rows = Rows(
        np.zeros(0, np.int64),
        np.zeros((0, 16), np.uint8),
        none,
        np.zeros((0, CROPS, vectors.dim), np.float16),
    )
    _, crops = items.visiting_of(rows, visiting)
    return tuple(bool(crop) for crop in crops)


def _groups(files: Sequence[InputFile]) -> list[tuple[str, tuple[InputFile, ...]]]:
    """Input files in at most `FILE_GROUPS` groups, called after their first file."""
    count = min(len(files), FILE_GROUPS)
    bounds = [len(files) * i // count for i in range(count + 1)] if count else []
    return [(files[a].name, tuple(files[a:b])) for a, b in pairwise(bounds) if b > a]


def _files_of(portion: Portion, inputs: Inputs) -> tuple[InputFile, ...]:
    names = {part.name for part in portion.parts}
    return tuple(inputs.files[int(name)] for name in sorted(names))


def _end(files: Sequence[InputFile]) -> int:
    return files[-1].first + files[-1].rows


def _cpus_of_fit() -> float:
    """The fit is one task; it may have the CPUs of a small machine, for nothing else runs."""
    import ray

    return float(max(1, min(8, *(node["Resources"].get("CPU", 1) for node in ray.nodes()))))
