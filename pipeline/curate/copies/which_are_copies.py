"""Where a row is called a copy: groups of images that show the same, with the one that is kept.

Pairs that are alike (`pairs`) get a second look. Those that show the same join images to groups, as
far as they reach, and of each group one image is its keeper (`keepers`). Every other member is a
copy of it, unless it differs from its keeper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.cell_items import ImageSet
from pipeline.curate.copies.forest import label_rows
from pipeline.curate.copies.keeper_facts import FactSources, gather_facts, shards_for
from pipeline.curate.copies.keepers import CopyRule, HowSimilar, choose_keepers
from pipeline.curate.copies.pairs import Pairs
from pipeline.curate.look.look_at_pairs import Looking, look_at, pairs_of_rows, verdicts_of
from pipeline.curate.rows.read_rows import file_groups
from pipeline.curate.rows.tables import AS_IS, COMPONENTS, EDGES, id_array, ids_of
from pipeline.curate.steps.steps import Account, Output, Step, Steps, by_file, numbered

LOOKED_EDGES = "looks/edges/looked"  # the step with the verdicts on edges


def group_copies(
    steps: Steps,
    pairs: Pairs,
    images: ImageSet,
    prints: Step,
    rule: CopyRule,
    going: Sequence[Step] = (),
    looking: Looking | None = None,
) -> Step:
    """Groups of copies with a keeper each: `tables.COMPONENTS` of each input file.

    A second look decides of each edge whether it is one. It looks at the edges of the forest, one
    less than the images of a group at most, and then at members with their keepers, where these
    are no edge: a member that differs from its keeper stays.

    Args:
        steps: of the curation.
        pairs: of the images that are alike.
        images: the same, with the vectors that the pairs were found with.
        prints: fingerprints, by which the best copy is told.
        rule: when images are copies; its threshold is not below `pairs.lowest`.
        going: steps with the `row` of images that go in any case: leaks, copies of what was curated
            earlier. One of them is a keeper only where all images of its group are such.
        looking: for the second look; None: what is alike is a copy.
    """
    assert rule.threshold >= pairs.lowest, "edges below were not looked for"
    edges, index, inputs = pairs.edges, pairs.index, images.inputs
    # A look takes 0.1 s of a core. So the edges of the forest get one, and not all pairs.
    if looking:
        edges = edges_that_hold(steps, edges, looking, rule.threshold)
    tables = {name: name for name in edges.tables}
    labels = steps.run("copies/labels", label_rows, tables, edges=edges,
                       threshold=rule.threshold)  # fmt: skip
    # What the choice needs of each row goes to the shard of its group: groups span all files.
    shards = shards_for(int(labels.total("rows")), images.vectors)
    sources = FactSources(images.distinct(index.equal), labels, prints, tuple(going))
    as_is = [file.name for file in inputs.files if file.kind == AS_IS]
    facts = steps.run("copies/gathered", gather_facts, images.portions(index.portion_rows),
                      sources=sources, as_is=as_is, shards=shards)  # fmt: skip
    similar = HowSimilar(images.visiting, index.penalty)
    kept = steps.run("copies/kept", choose_keepers, numbered(shards), facts=facts,
                     dim=images.vectors.dim, similar=similar, rule=rule)  # fmt: skip
    # Members were joined by a chain of edges, so not each of them was held against its keeper.
    if looking:
        kept = members_that_stay(steps, kept, edges, looking)
    files = file_groups(inputs.files)
    return steps.run("components", by_file, files, of=kept, schema=COMPONENTS)


def edges_that_hold(steps: Steps, edges: Step, looking: Looking, threshold: float) -> Step:
    """The edges above the threshold whose ends show the same."""
    tables = {name: name for name in edges.tables}
    looked = look_at(steps, "looks/edges", looking, tables, pairs_of_edges, edges=edges,
                     threshold=threshold)  # fmt: skip
    return steps.run("looks/edges/hold", write_edges, looked.names, looked=looked.step)


def pairs_of_edges(table: str, edges: Step, threshold: float) -> pa.Table:
    """Edges above the threshold, as pairs to look at."""
    above = edges.read(table, EDGES.names, [("similarity", ">", threshold)])
    return pairs_of_rows(above["a"], above["b"], above["similarity"])


def write_edges(out: Output, names: Sequence[str], looked: Step) -> None:
    """Task: the pairs of a source that show the same, as `tables.EDGES`."""
    table = verdicts_of(looked, names).select(["row", "other", "similarity"])
    out.table(table.rename_columns(EDGES.names).cast(EDGES))


def members_that_stay(steps: Steps, kept: Step, edges: Step, looking: Looking) -> Step:
    """The groups, where a member that differs from its keeper is its own keeper."""
    tables = {name: name for name in kept.tables}
    looked = look_at(steps, "looks/keepers", looking, tables, pairs_of_keepers, kept=kept,
                     edges=edges)  # fmt: skip
    names = looked.names
    return steps.run("looks/keepers/hold", write_members, names, kept=kept, looked=looked.step)


def pairs_of_keepers(table: str, kept: Step, edges: Step) -> pa.Table:
    """Members with their keepers, as far as these are no edge that was looked at."""
    members = kept.read(table, ["row", "keeper", "similarity"])
    row, keeper = members["row"].to_numpy(), members["keeper"].to_numpy()
    unknown = row != keeper
    mine = _unordered(row, keeper)
    for name in edges.tables if unknown.any() else ():
        ends = edges.read(name, ["a", "b"])
        unknown &= ~np.isin(mine, _unordered(ends["a"].to_numpy(), ends["b"].to_numpy()))
    similarity = members["similarity"].to_numpy()
    return pairs_of_rows(row[unknown], keeper[unknown], similarity[unknown])


def _unordered(a: Any, b: Any) -> Any:
    """Pairs of rows, each as 16 bytes, whichever comes first."""
    both = np.stack([np.minimum(a, b), np.maximum(a, b)], 1).astype(">i8")
    return both.view("S16").ravel()


def write_members(out: Output, names: Sequence[str], kept: Step, looked: Step) -> Account:
    """Task: the groups of a shard; a member that differs from its keeper is its own."""
    table = kept.read(out.name)
    apart = verdicts_of(looked, names, same=False)["row"].to_numpy()
    row = table["row"].to_numpy()
    stays = np.isin(row, apart)
    ids = np.where(stays[:, None], ids_of(table["image_id"]), ids_of(table["keeper_id"]))
    chained = table["chained"].to_numpy(zero_copy_only=False) | stays
    columns = {
        "keeper": np.where(stays, row, table["keeper"].to_numpy()),
        "keeper_id": id_array(ids),
        "similarity": np.where(stays, 1.0, table["similarity"].to_numpy()),
        "chained": chained,
    }
    changed = {name: columns.get(name, table[name]) for name in COMPONENTS.names}
    out.table(pa.table(changed, schema=COMPONENTS))
    return {"chained": int(chained.sum())}
