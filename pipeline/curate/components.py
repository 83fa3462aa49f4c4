"""From edges to components of copies with a keeper each, in steps each of which resumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.curate import connected, gather, keepers
from pipeline.curate.bucketed import written
from pipeline.curate.copies import Copies
from pipeline.curate.items import Visiting
from pipeline.curate.portions import Portion, portions
from pipeline.curate.spread import file_groups, spread
from pipeline.curate.tables import COMPONENTS, InputFile, Inputs, Vectors
from pipeline.curate.work import Result, Task, run_step


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
        connected.label_task,
    )
    parts = gather.parts_for(int(labels.total("rows")), vectors)
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
        gather.gather_task,
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
        keepers.keep_task,
    )
    part_names = [f"{part:05d}" for part in range(parts)]
    found = run_step(
        root,
        "components",
        [kept.key, inputs.digest],
        [Task(name, (kept.folder, part_names, files)) for name, files in file_groups(inputs.files)],
        spread_task,
    )
    return found, (labels, gathered, kept, found)


def _files_of(portion: Portion, inputs: Inputs) -> tuple[InputFile, ...]:
    names = {part.name for part in portion.parts}
    return tuple(inputs.files[int(name)] for name in sorted(names))


def spread_task(
    folder: str, parts: str, names: Sequence[str], files: Sequence[InputFile]
) -> dict[str, Any]:
    """Writes the components of the rows of each of these input files."""
    return spread(folder, parts, names, files, COMPONENTS)
