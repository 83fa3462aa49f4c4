"""Looks at images through a backbone: attention, parts, similarity, masks from one example.

python jobs/look.py photo.jpg more/ model=runs/photos
python jobs/look.py street.jpg model=runs/photos mark=120,80
python jobs/look.py street.jpg model=runs/photos reference=other.jpg mask=other.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(
        ["look"],
        __doc__,
        shorthand={
            "": "look.images",
            "model": "look.model",
            "image_size": "look.image_size",
            "block": "look.block",
            "mark": "look.mark",
            "reference": "look.reference",
            "mask": "look.mask",
            "void": "look.void",
            "method": "look.method",
            "k": "look.k",
            "count": "look.count",
            "out": "look.out",
        },
    )
