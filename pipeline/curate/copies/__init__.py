"""Near copies within a set of any size, and of images of other sets. Start at `pairs.py`.

In: vectors and a threshold. Out: pairs, components, a keeper for each; leaks; matches.
Order: collapse, cell_fit, items, join, edges, keeper_facts, keepers, components; then leaks and
matches, by `relative`. Imports: look, rows, steps, storage.
"""
