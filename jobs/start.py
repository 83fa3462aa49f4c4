"""Looks at a folder of images and at the machine, and writes the recipe that fits, with reasons.

    python jobs/start.py photos/
    python jobs/start.py photos/ weights.safetensors     adapts these weights
    python jobs/start.py photos/ gpu_gb=24 --dry-run     for a GPU of that size, wherever it is

Writes photos.yaml (recipe=FILE names another file), each value with its reason as a comment, and
says what to run. --dry-run writes nothing and says steps, memory, disk and hours. With RAY_ADDRESS
set it asks that cluster what it has.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(
        ["start"],
        __doc__,
        shorthand={
            "recipe": "start.recipe",
            "weights": "model.init",
            "data": "data.source",
            "queries": "evaluate.queries",
            "gpu_gb": "start.gpu_gb",
            "hours": "start.hours",
        },
        words=("data.source", "model.init"),
    )
