"""Fine-tunes a backbone into a classifier of labelled images, scores it and exports it.

    python jobs/finetune.py model=runs/photos data=photos/ queries=val/
    python jobs/finetune.py model=timm:vit_small_patch16_224 data=photos/ finetune.tune=head
    python jobs/finetune.py model=runs/photos data=photos/ finetune.label_fraction=0.1 --dry-run

Classes are folders, or a label column. Without queries= a fifth of each class is held out and
scored. Writes runs/<name>/finetune/huggingface (docs/finetune.md); without run.name the run is
called finetune. Without model= the run's own teacher is taken. The same command goes on after a
kill.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(
        ["pack", "finetune"],
        __doc__,
        shorthand={
            "model": "finetune.model",
            "data": "data.source",
            "queries": "evaluate.queries",
        },
    )
