"""Chooses the images that are worth training on, and says of each other one why it is not.

    python jobs/curate.py configs/curate.yaml data.shards=shards/
    python jobs/curate.py configs/curate.yaml data.shards=shards/ --dry-run
    python jobs/curate.py configs/curate.yaml curate.query=photo.jpg

Writes runs/<name>/curated (image shards), runs/<name>/curate/steps/decisions (a row per image) and
runs/<name>/curate/report.html. With curate.query it only says whether that image is a copy of one
that was curated before.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(["curate"], __doc__)
