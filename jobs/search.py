"""Finds what is like an image among images that are embedded.

python jobs/search.py vectors=runs/photos/vectors query=photo.jpg k=20
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

SHORT = {
    name: f"search.{name}" for name in ("vectors", "query", "k", "index", "model", "min_similarity")
}

if __name__ == "__main__":
    main(["search"], __doc__, shorthand=SHORT)
