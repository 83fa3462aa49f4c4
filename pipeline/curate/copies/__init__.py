"""Near copies in a set of any size, and like images of other sets. Start at `pairs.py`.

In: vectors and a threshold. Out: pairs, components, a keeper for each; leaks; matches.
Order: put_in_cells, join, pairs, edges, components, keepers. Imports: look, rows, steps, storage.
"""
