"""Looks at images through a backbone: attention, parts, similarity, masks from one example.

python jobs/look.py photo.jpg more/ model=runs/photos
python jobs/look.py street.jpg model=runs/photos mark=120,80
python jobs/look.py street.jpg model=runs/photos reference=other.jpg mask=other.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

SHORT = "model images image_size block mark reference mask void method k out count"

if __name__ == "__main__":
    names = {name: f"look.{name}" for name in SHORT.split()}
    main(["look"], __doc__, shorthand={"": "look.images", **names})
