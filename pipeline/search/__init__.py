"""Nearest neighbours of an image among vectors that `embed` wrote. Start at `search.py`.

In: a table of vectors, and images, ids or vectors that are asked for. Out: their neighbours, as
rows, parquet and a page. `exact` has the maths, `ivf` the index for more than a million vectors.
Imports: embed, report, images, storage.
"""

from pipeline.search.search import Search, open_search

__all__ = ["Search", "open_search"]
