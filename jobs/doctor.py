"""Reads some images of the shards, times each stage per core, and says what the machine can feed.

    python jobs/doctor.py data.shards=shards/
    python jobs/doctor.py configs/vits14.yaml data.shards=shards/

It takes half a minute, starts no Ray and writes nothing that stays. With RAY_ADDRESS set it asks
that cluster for its CPUs and GPUs; the times are those of the machine it runs on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(["doctor"], __doc__)
