"""Copies: the steps from vectors to components, each of which resumes.

find_pairs       collapse equal vectors, fit cells, write buckets, join, reduce to edges
find_components  edges above a threshold to components with a keeper each

`relative` has evaluation sets, new images and single ones against the same buckets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.curate import cells as cells_of
from pipeline.curate import collapse, components, edges, items, join
from pipeline.curate.items import Shuffled, Visiting
from pipeline.curate.portions import CROPS, Portion, Rows, portions
from pipeline.curate.tables import InputFile, Inputs, Vectors
from pipeline.curate.work import Result, Task, run_step
from pipeline.data.storage import resolve_uri
from pipeline.data.transfer import read_json, write_bytes_atomic
from pipeline.errors import DataError
from pipeline.uri import Place, public
from pipeline.uri import join as join_place

FILE_GROUPS = 256  # tasks that write the tables of input files, at least where there are as many
GROUP_ROWS = 4_000_000  # of the files of such a task
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
        edges: folder of `tables.EDGES`; empty where images were not compared with each other.
        edge_names: of its tables.
        lowest: similarity that all edges are above.
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
    edge_names: tuple[str, ...]
    lowest: float
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
            DataError: there is none, or it was written by another version.
        """
        fs, path = resolve_uri(str(join_place(root, STORED)))
        value = read_json(fs, path)
        if value is None:
            raise DataError(
                f"{public(str(root))} holds no curation with copies: {STORED} is missing",
                "name the folder of a curation that is finished and had dedup.enabled=true",
            )
        if set(value) | {"steps"} != {field.name for field in fields(cls)}:
            raise DataError(
                f"{public(str(root))} was curated by another version: {STORED} has other fields",
                "curate it again",
            )
        value = json.loads(json.dumps(value).replace("{root}", json.dumps(str(root))[1:-1]))
        shuffled = value["shuffled"]
        names = tuple((name, tuple(shelves)) for name, shelves in shuffled["names"])
        crops = tuple(shuffled["crops"])
        value["shuffled"] = Shuffled(**{**shuffled, "names": names, "crops": crops})
        value["copies"] = (value["copies"][0], tuple(value["copies"][1]))
        value["edge_names"] = tuple(value["edge_names"])
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
    compare: bool = True,
    suffices: float = -1.0,
    _buckets: int | None = None,
    _portion_rows: int | None = None,
    _shards: int | None = None,
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
        compare: the images with each other; else they are only put into their buckets, which is
            what other sets are compared with.
        suffices: where an earlier run compared the same items with a `lowest` that is not above
            this, its pairs are taken as they are: those above any threshold are the same.
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
    made: tuple[Result, ...] = ()
    if compare:
        known = _lowest_of(root, steps[-1].key, penalty)
        if known is not None and known <= suffices:
            lowest = known
        names = [f"{b:05d}" for b in range(buckets)]
        pairs = run_step(
            root,
            "copies/pairs",
            [steps[-1].key, lowest, penalty],
            [Task(name, (where, b, lowest, penalty)) for b, name in enumerate(names)],
            join.join_task,
            gpus=gpus,
        )
        of_equals = next(step for step in steps if step.step == "copies/collapse")
        made = (pairs, *edges.reduce(root, pairs, names, of_equals, copies[1], lowest, _shards))
    steps = (*steps, *made)
    found = Copies(
        root=str(root),
        rows=inputs.rows,
        penalty=penalty,
        cells=next(step.folder for step in steps if step.step == "copies/cells"),
        buckets=buckets,
        shuffled=where,
        copies=copies,
        edges=made[-1].folder if made else "",
        edge_names=tuple(f"{s:05d}" for s in range(len(made[-1].accounts))) if made else (),
        lowest=lowest,
        portion_rows=_portion_rows,
        keys={step.step: step.key for step in steps},
        steps=steps,
    )
    found.save()
    return found


def _lowest_of(root: Place, items_key: str, penalty: float) -> float | None:
    """The `lowest` that these items were compared with by the last run, if they were."""
    fs, path = resolve_uri(str(join_place(root, STORED)))
    value = read_json(fs, path)
    if value is None or value["penalty"] != penalty or "copies/pairs" not in value["keys"]:
        return None
    return float(value["lowest"]) if value["keys"]["copies/shuffle"] == items_key else None


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
    names = written(of, hashed)
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
    where = Shuffled(shuffled.folder, written(of, shuffled), vectors.dim, probes, crops)
    return buckets, copies, where, tuple(steps)


def find_components(
    copies: Copies,
    inputs: Inputs,
    vectors: Vectors,
    *,
    fingerprints: tuple[str, str],
    threshold: float,
    guard: float,
    chains: str = "split",
    aside: Sequence[tuple[str, str]] = (),
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
        aside: folders and keys of steps whose tables have the `row` of images that go in any
            case: leaks, copies of what was curated earlier. One of them is a keeper only where
            all images of its component are such.
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
        [Task(name, (copies.edges, name, threshold)) for name in copies.edge_names],
        components.label_task,
    )
    parts = components.parts_for(int(labels.total("rows")), vectors)
    gathered = run_step(
        root,
        "copies/gathered",
        [
            labels.key,
            copies.keys["copies/collapse"],
            fingerprints[1],
            [key for _, key in aside],
            parts,
        ],
        [
            Task(
                p.name,
                (
                    vectors,
                    p,
                    _files_of(p, inputs),
                    (labels.folder, copies.edge_names),
                    copies.copies,
                    fingerprints[0],
                    tuple(folder for folder, _ in aside),
                    parts,
                ),
            )
            for p in of
        ],
        components.gather_task,
    )
    least = threshold - guard
    names, vector_names = (written(of, gathered, of_) for of_ in ("shelves", "vector_shelves"))
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
        [Task(name, (kept.folder, part_names, files)) for name, files in file_groups(inputs.files)],
        components.spread_task,
    )
    return found, (labels, gathered, kept, found)


def written(
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


def file_groups(files: Sequence[InputFile]) -> list[tuple[str, tuple[InputFile, ...]]]:
    """Neighbouring input files in groups for a task each, called after their first file."""
    rows = end_of(files) - files[0].first if files else 0
    count = min(len(files), max(FILE_GROUPS, -(-rows // GROUP_ROWS)))
    bounds = [len(files) * i // count for i in range(count + 1)] if count else []
    return [(files[a].name, tuple(files[a:b])) for a, b in pairwise(bounds) if b > a]


def _files_of(portion: Portion, inputs: Inputs) -> tuple[InputFile, ...]:
    names = {part.name for part in portion.parts}
    return tuple(inputs.files[int(name)] for name in sorted(names))


def end_of(files: Sequence[InputFile]) -> int:
    """The first row after these consecutive files."""
    return files[-1].first + files[-1].rows


def _cpus_of_fit() -> float:
    """The fit is one task; it may have the CPUs of a small machine, for nothing else runs."""
    import ray

    return float(max(1, min(8, *(node["Resources"].get("CPU", 1) for node in ray.nodes()))))
