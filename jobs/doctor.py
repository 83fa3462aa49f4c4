"""Tries the GPUs, reads some images of the shards, and says what the machine can feed.

    python jobs/doctor.py data.shards=shards/
    python jobs/doctor.py configs/vits14.yaml data.shards=shards/
    RAY_ADDRESS=auto python jobs/doctor.py

It takes half a minute, starts no Ray and writes nothing that stays. With RAY_ADDRESS set it asks
that cluster for its CPUs and GPUs; the times are those of the machine it runs on. Where there are
GPUs it compiles a kernel and adds numbers up over them, on each node and over all nodes, and says
in a line for each node what works and what is missing: some minutes. Without shards it ends there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(["doctor"], __doc__)
