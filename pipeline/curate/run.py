"""A curation from top to bottom: which images are kept, and for each other one why it is not.

Every step writes tables below `<run folder>/curate/steps` and goes on where an earlier run stopped.
It is not run again as long as its settings and what it reads stay the same; so another threshold
costs what comes after it.
"""

from __future__ import annotations

from pipeline.config.config import Config
from pipeline.curate.curation import Choice, Comparison, Curation, Known, Setup
from pipeline.curate.run_choose import (
    balance,
    embed_content,
    open_seeds,
    pool_rows,
    retrieve,
    what_is_left,
)
from pipeline.curate.run_copies import (
    compare,
    embed_for_copies,
    find_leaks,
    find_threshold,
    group_copies,
    leaking_groups,
    match_earlier,
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
    # worth training on; of images with equal bytes or equal pixels one stays. `known` collects the
    # tables that say what goes. Where several do, the first of this order is the reason: quality,
    # equal, leak, earlier, near copy.
    prints = fingerprint_images(setup)
    marks = mark_quality(setup, prints) if config.quality.enabled else None
    equal = find_equal(setup, prints, marks)
    known = Known().adding("fingerprint", prints).adding("quality", marks).adding("exact", equal)

    # Images are compared by vectors. Of two that are alike, a second look at their pixels says
    # whether they are copies: in `match_earlier`, `find_leaks` and `group_copies`. A copy goes if
    # it is of an image that was curated earlier, or of one of an evaluation set; of each group of
    # copies that is left, the best image stays.
    comparison = None
    if config.dedup.enabled or sets.leaks or sets.earlier:
        vectors = embed_for_copies(setup, prints)
        threshold = find_threshold(setup, prints, equal, vectors)
        earlier = match_earlier(setup, equal, vectors, threshold)
        for matches in earlier:
            known = known.adding("matches", matches)
        copies = compare(setup, equal, vectors, threshold)
        leaks = find_leaks(setup, copies, vectors, threshold) if sets.leaks else None
        known = known.adding("leaks", leaks)
        groups = leaking = None
        if config.dedup.enabled:
            going = [*earlier, leaks] if leaks else earlier
            groups = group_copies(setup, copies, prints, vectors, threshold, going)
            known = known.adding("components", groups)
        if groups and leaks and config.leaks.scope == "components":
            leaking = leaking_groups(setup, known)
            known = known.adding("leaking", leaking)
        comparison = Comparison(vectors, threshold, earlier, copies, leaks, groups, leaking)

    # Of what is left of the pool: images like those of seed sets, and a balanced sample. The
    # recipe may ask for both, or for neither: then all of it is kept.
    choice = None
    if sets.seeds or config.balance.images:
        left = what_is_left(setup, known)
        content = embed_content(setup, prints, comparison.embedded if comparison else None)
        pool = pool_rows(setup, content, left)
        seeds = open_seeds(setup, prints, content, left)
        retrieved = retrieve(setup, pool, seeds) if sets.seeds else None
        balanced = balance(setup, pool) if config.balance.images else None
        known = known.adding("retrieved", retrieved.result if retrieved else None)
        known = known.adding("balanced", balanced.result if balanced else None)
        choice = Choice(left, content, seeds, retrieved, balanced)

    decisions = decide(setup, known)
    return Curation(setup, prints, marks, equal, comparison, choice, decisions)
