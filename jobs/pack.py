"""Packs images into image shards.

    python jobs/pack.py data.source=photos/ data.shards=shards/

The source is a folder of any depth, tar files, hub-style parquet or image shards, local or a URI.
Bad images are listed in runs/<name>/pack/bad_images_train.parquet with their reason.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(["pack"], __doc__)
