"""Finds what is like an image among images that are embedded.

    python jobs/search.py vectors=runs/photos query=photo.jpg k=20
    python jobs/search.py vectors=runs/photos query=3f9a2c,other.png min_similarity=0.8
    python jobs/search.py vectors=runs/photos query=holiday/ run.name=holiday

A query is an image file, the id of an image of the set or its beginning, a folder of images, or
parquet of images or vectors. Writes search.html and neighbours.parquet into runs/search/search.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(
        ["search"],
        __doc__,
        shorthand={
            "vectors": "search.vectors",
            "query": "search.query",
            "k": "search.k",
            "index": "search.index",
            "model": "search.model",
            "min_similarity": "search.min_similarity",
        },
    )
