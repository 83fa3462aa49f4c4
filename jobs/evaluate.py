"""Evaluates the teacher of a run: weighted k-NN on labelled shards, feature health without.

python jobs/evaluate.py configs/cifar10.yaml evaluate.queries=cifar10/test
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(["evaluate"], __doc__)
