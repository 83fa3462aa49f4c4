"""Trains a DINOv2 backbone on image shards; the same command again resumes.

python jobs/pretrain.py configs/cifar10.yaml data.shards=shards/ optim.lr=1e-3
python jobs/pretrain.py configs/cifar10.yaml data.shards=shards/ --dry-run
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(["pretrain"], __doc__)
