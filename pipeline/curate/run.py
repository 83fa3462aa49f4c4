"""A curation from top to bottom: which images are kept, and for each other one why it is not.

Every step writes tables below `<run folder>/curate/steps` and goes on where an earlier run stopped.
It is not run again as long as its settings and what it reads stay the same; so another threshold
costs what comes after it.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.config import Config
from pipeline.curate.curation import Choice, Comparison, Curation, Setup
from pipeline.curate.decide.file_rows import Known
from pipeline.curate.run_choose import (
    balance,
    embed_content,
    open_seeds,
    pool_rows,
    retrieve,
    what_is_left,
)
from pipeline.curate.run_copies import (
    embed_for_copies,
    find_leaks,
    find_pairs,
    find_threshold,
    group_copies,
    leaking_groups,
    match_earlier,
    put_in_cells,
)
from pipeline.curate.run_decide import decide
from pipeline.curate.run_images import find_equal, fingerprint_images, mark_quality
from pipeline.curate.sets import Sets
from pipeline.uri import Place


def curate(config: Config, sets: Sets, root: Place) -> Curation:
    """Runs all steps up to the decisions; needs a joined Ray cluster.

    Args:
        config: the recipe.
        sets: what goes in.
        root: folder of the steps, that all nodes reach.

    Raises:
        PipelineError: a table is damaged, or a step could not do its work.
    """
    setup = Setup.of(config, sets, root)

    # All that is asked of pixels is asked while an image is decoded. Rules mark those that are not
    # worth training on; of images with equal bytes or equal pixels one stays. `known` has the steps
    # that say what goes. Where several do, the first of this order is the reason: quality, equal,
    # leak, earlier, near copy.
    prints = fingerprint_images(setup)
    marks = mark_quality(setup, prints) if config.quality.enabled else None
    equal = find_equal(setup, prints, marks)
    known = Known(prints, marks, equal)

    # Images are compared by vectors. Of two that are alike, a second look at their pixels says
    # whether they are copies: in `match_earlier`, `find_leaks` and `group_copies`. A copy goes if
    # it is of an image that was curated earlier, or of one of an evaluation set; of each group of
    # copies that is left, the best image stays. `index` has the vectors in cells, so that images
    # are compared with near ones only; later curations match their own images against it.
    comparison = None
    if config.dedup.enabled or sets.leaks or sets.earlier:
        embedded = embed_for_copies(setup, prints)
        threshold = find_threshold(setup, prints, equal, embedded)
        earlier = match_earlier(setup, equal, embedded, threshold)
        index = put_in_cells(setup, equal, embedded, threshold)
        leaks = find_leaks(setup, index, embedded, threshold) if sets.leaks else None
        known = replace(known, matches=earlier, leaks=leaks.table if leaks else None)
        pairs = None
        if config.dedup.enabled:
            pairs = find_pairs(setup, index, threshold)
            known = replace(known, groups=group_copies(setup, pairs, known, embedded, threshold))
        if pairs and leaks and config.leaks.scope == "components":
            # a group of copies is a component of the graph of pairs: it goes as a whole
            known = replace(known, leaking=leaking_groups(setup, known))
        comparison = Comparison(embedded, threshold, leaks, pairs)

    # Of what is left of the pool: images like those of seed sets, and a balanced sample. Where the
    # recipe asks for both, an image stays that is in either; where for neither, all of it is kept.
    choice = None
    if sets.seeds or config.balance.images:
        left = what_is_left(setup, known)
        content = embed_content(setup, prints, comparison.embedded if comparison else None)
        pool = pool_rows(setup, content, left)
        seeds = open_seeds(setup, prints, content, left)
        retrieved = retrieve(setup, pool, seeds) if sets.seeds else None
        balanced = balance(setup, pool) if config.balance.images else None
        known = replace(
            known,
            retrieved=retrieved.result if retrieved else None,
            balanced=balanced.result if balanced else None,
        )
        choice = Choice(seeds, retrieved, balanced)

    return Curation(setup, known, comparison, choice, decide(setup, known))
