"""Near copies in a set of any size, and images of other sets. Start at `which_are_copies.py`.

In: vectors of images, or of two sets. Out: which rows are copies, leaks or matches, and of which.
`which_are_copies.py` is where a row is called a copy. `pairs.py` is how pairs that are alike are
found: equal_vectors, fit_cells, cells, cell_items, join, forest. `keepers.py` and `keeper_facts.py`
say which of a group stays. `other_sets.py` compares other sets, for `leaks.py` and `matches.py`.
Imports: look, rows, steps, storage, errors, uri.
"""
