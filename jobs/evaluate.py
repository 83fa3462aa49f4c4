"""Says how good a backbone is: one card with every score, baselines beside it, and a verdict.

    python jobs/evaluate.py model=runs/photos data=labelled/ queries=test/
    python jobs/evaluate.py models=[timm:vit_small_patch14_dinov2,runs/photos] data=labelled/
    python jobs/evaluate.py configs/cifar10.yaml evaluate.queries=cifar10/test

The first scores a run, the second two models side by side, the third the run of the recipe. Models
are as for jobs/embed.py. data is a folder of images with a folder for each class, packed shards, or
vectors of jobs/embed.py. Without queries each image is classified by the others; without labels
there are scores that need none. Writes runs/<name>/evaluate/card.html and card.json; without
run.name the run is called evaluate.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(
        ["pack", "evaluate"],
        __doc__,
        shorthand={
            "model": "evaluate.models",
            "models": "evaluate.models",
            "data": "evaluate.reference",
            "queries": "evaluate.queries",
            "scores": "evaluate.scores",
            "dense": "evaluate.dense",
            "dense_queries": "evaluate.dense_queries",
            "cards": "evaluate.cards",
        },
    )
