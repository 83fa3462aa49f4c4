"""Runs the whole chain, from images to weights and what is made of them; skips finished stages.

python jobs/run.py configs/demo.yaml
python jobs/run.py configs/cifar10.yaml data.source=cifar10/train evaluate.queries=cifar10/test
python jobs/run.py configs/vits14.yaml curate.preset=balanced balance.images=100000 rounds=2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(
        ["pack", "curate", "adapt", "pretrain", "evaluate", "export", "embed", "search", "look"],
        __doc__,
        shorthand={"rounds": "curate.rounds"},
    )
