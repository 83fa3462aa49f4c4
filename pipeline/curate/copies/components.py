"""From edges to components of copies with a keeper each, in steps each of which resumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies import edges, keeper_facts, keepers
from pipeline.curate.copies.items import ImageSet
from pipeline.curate.copies.keeper_facts import FactSources, KeeperFacts
from pipeline.curate.copies.keepers import Guard
from pipeline.curate.copies.stored_copies import Copies
from pipeline.curate.look.looks import PAIRS, Looking, look_at, verdicts_of
from pipeline.curate.rows.bucketed import written
from pipeline.curate.rows.by_file import by_file, file_groups
from pipeline.curate.rows.read_rows import Portion
from pipeline.curate.rows.tables import (
    COMPONENTS,
    EDGES,
    InputFile,
    Inputs,
    id_array,
    ids_of,
    read_table,
    write_table,
)
from pipeline.curate.steps.steps import Result, Task, run_step

LOOKED_EDGES = "looks/edges/looked"  # the step with the verdicts on edges


def find_components(
    copies: Copies,
    images: ImageSet,
    *,
    fingerprints: tuple[str, str],
    threshold: float,
    guard: float,
    chains: str = "split",
    aside: Sequence[tuple[str, str]] = (),
    looking: Looking | None = None,
) -> tuple[Result, tuple[Result, ...]]:
    """Components of copies with a keeper each.

    A second look decides of each edge whether it is one. It looks at the edges of the forest, one
    less than the images of a component at most, and then at members with their keepers, where
    these are no edge: a member that differs from its keeper stays.

    Args:
        copies: of the images.
        images: the same, with the vectors that the copies were found with.
        fingerprints: folder of `tables.FINGERPRINT` and key of its step.
        threshold: similarity that an edge must be above; not below `copies.lowest`.
        guard: a member that is so much less like its keeper than the threshold is of a chain.
        chains: `split`: such members get keepers of their own; `keep`: one for each component.
        aside: folders and keys of steps whose tables have the `row` of images that go in any
            case: leaks, copies of what was curated earlier. One of them is a keeper only where
            all images of its component are such.
        looking: for the second look; None: what is alike is a copy.

    Returns:
        The step whose folder has `tables.COMPONENTS` of each input file, and all steps.
    """
    assert threshold >= copies.lowest, "edges below were not looked for"
    root = copies.root
    inputs, of = images.inputs, images.portions(copies.portion_rows)
    edges_folder, edges_key = copies.edges, copies.keys["edges"]
    looks: tuple[Result, ...] = ()
    if looking is not None:
        edges_folder, edges_key, looks = _edges_that_hold(copies, looking, threshold)
    labels = run_step(
        root,
        "copies/labels",
        [edges_key, threshold],
        [Task(name, (edges_folder, name, threshold)) for name in copies.edge_names],
        edges.label_task,
    )
    parts = keeper_facts.parts_for(int(labels.total("rows")), images.vectors)
    sources = FactSources(
        images.distinct(copies.copies),
        (labels.folder, copies.edge_names),
        fingerprints[0],
        tuple(folder for folder, _ in aside),
    )
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
        [Task(p.name, (sources, p, _files_of(p, inputs), parts)) for p in of],
        keeper_facts.facts_task,
    )
    least = threshold - guard
    rows, vectors = (written(of, gathered, which) for which in ("shelves", "vector_shelves"))
    facts = KeeperFacts(gathered.folder, rows, vectors, images.vectors.dim)
    part_names = [f"{part:05d}" for part in range(parts)]
    kept = run_step(
        root,
        "copies/kept",
        [gathered.key, least, chains, copies.penalty],
        [
            Task(name, (facts, part, images.visiting, copies.penalty, Guard(least, chains)))
            for part, name in enumerate(part_names)
        ],
        keepers.keep_task,
    )
    steps: tuple[Result, ...] = (*looks, labels, gathered, kept)
    if looking is not None:
        kept, more = _keepers_that_hold(
            copies, looking, kept, part_names, (edges_folder, edges_key)
        )
        steps += more
    components = run_step(
        root,
        "components",
        [kept.key, inputs.digest],
        [Task(name, (kept.folder, part_names, files)) for name, files in file_groups(inputs.files)],
        by_file_task,
    )
    return components, (*steps, components)


def _edges_that_hold(
    copies: Copies, looking: Looking, threshold: float
) -> tuple[str, str, tuple[Result, ...]]:
    """Folder and key of the edges above the threshold whose ends show the same."""
    looked = look_at(
        copies.root,
        "looks/edges",
        looking,
        [copies.keys["edges"], threshold],
        [(name, (copies.edges, name, threshold)) for name in copies.edge_names],
        pairs_of_edges,
    )
    hold = run_step(
        copies.root,
        "looks/edges/hold",
        [looked.key],
        [Task(name, (name, looked.folder, looked.names[name])) for name in copies.edge_names],
        hold_task,
    )
    return hold.folder, hold.key, (*looked.steps, hold)


def pairs_of_edges(edges: str, name: str, threshold: float) -> pa.Table:
    """Edges above the threshold, as pairs to look at."""
    table = read_table(edges, name, filters=[("similarity", ">", threshold)])
    return pairs_table(*(table.column(column).to_numpy() for column in EDGES.names))


def pairs_table(row: Any, other: Any, similarity: Any) -> pa.Table:
    """Pairs of rows, as `looks.PAIRS`."""
    n = len(row)
    columns = [row, other, pa.array([""] * n, pa.string()), pa.nulls(n, PAIRS.field(3).type)]
    return pa.table([*columns, similarity], schema=PAIRS)


def hold_task(folder: str, name: str, looked: str, names: Sequence[str]) -> dict[str, Any]:
    """Writes the pairs of a source that show the same as `tables.EDGES`."""
    table = verdicts_of(looked, names).select(["row", "other", "similarity"])
    table = table.rename_columns(EDGES.names).cast(EDGES)
    return {"rows": len(table), "bytes": write_table(table, folder, name)}


def _keepers_that_hold(
    copies: Copies,
    looking: Looking,
    kept: Result,
    parts: Sequence[str],
    edges: tuple[str, str],
) -> tuple[Result, tuple[Result, ...]]:
    """The components without the members that differ from their keeper."""
    looked = look_at(
        copies.root,
        "looks/keepers",
        looking,
        [kept.key, edges[1]],
        [(name, (kept.folder, name, edges[0], copies.edge_names)) for name in parts],
        pairs_of_keepers,
    )
    hold = run_step(
        copies.root,
        "looks/keepers/hold",
        [kept.key, looked.key],
        [Task(name, (name, kept.folder, looked.folder, looked.names[name])) for name in parts],
        stay_task,
    )
    return hold, (*looked.steps, hold)


def pairs_of_keepers(kept: str, name: str, edges: str, edge_names: Sequence[str]) -> pa.Table:
    """Members with their keepers, as far as these are no edge that was looked at."""
    table = read_table(kept, name, ["row", "keeper", "similarity"])
    table = table.filter(pa.array(table["row"].to_numpy() != table["keeper"].to_numpy()))
    row, keeper = table["row"].to_numpy(), table["keeper"].to_numpy()
    mine, known = _unordered(row, keeper), np.zeros(len(row), bool)
    for one in edge_names if len(row) else ():
        ends = read_table(edges, one, ["a", "b"])
        known |= np.isin(mine, _unordered(ends["a"].to_numpy(), ends["b"].to_numpy()))
    left = ~known
    return pairs_table(row[left], keeper[left], table["similarity"].to_numpy()[left])


def _unordered(a: Any, b: Any) -> Any:
    """Pairs of rows, each as 16 bytes, whichever comes first."""
    both = np.stack([np.minimum(a, b), np.maximum(a, b)], 1).astype(">i8")
    return both.view("S16").ravel()


def stay_task(
    folder: str, name: str, kept: str, looked: str, names: Sequence[str]
) -> dict[str, Any]:
    """Writes the components of a part; a member that differs from its keeper is its own."""
    table = read_table(kept, name)
    apart = verdicts_of(looked, names, same=False)["row"].to_numpy()
    row = table["row"].to_numpy()
    stays = np.isin(row, apart)
    ids = np.where(stays[:, None], ids_of(table["image_id"]), ids_of(table["keeper_id"]))
    columns = {
        "keeper": np.where(stays, row, table["keeper"].to_numpy()),
        "keeper_id": id_array(ids),
        "similarity": np.where(stays, 1.0, table["similarity"].to_numpy()),
        "chained": table["chained"].to_numpy(zero_copy_only=False) | stays,
    }
    for column, values in columns.items():
        array = values if isinstance(values, pa.Array) else pa.array(values)
        table = table.set_column(table.schema.get_field_index(column), column, array)
    size = write_table(table.select(COMPONENTS.names).cast(COMPONENTS), folder, name)
    return {"rows": len(table), "bytes": size, "chained": int(columns["chained"].sum())}


def _files_of(portion: Portion, inputs: Inputs) -> tuple[InputFile, ...]:
    names = {part.name for part in portion.parts}
    return tuple(inputs.files[int(name)] for name in sorted(names))


def by_file_task(
    folder: str, parts: str, names: Sequence[str], files: Sequence[InputFile]
) -> dict[str, Any]:
    """Writes the components of the rows of each of these input files."""
    return by_file(folder, parts, names, files, COMPONENTS)
