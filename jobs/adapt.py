"""Adapts released weights to your images, and measures what that did: before, after, verdict.

    python jobs/adapt.py weights.safetensors photos/
    python jobs/adapt.py timm:vit_small_patch14_dinov2 photos/ queries=val/ run.name=leaves
    python jobs/adapt.py dinov2_vits14.pth photos/ optim.steps=500 --dry-run

The first word names the weights: a dinov2 .pth, a Hugging Face or timm folder, a .safetensors file,
timm:<name>, or a run or an export of ours. The second names the images, with a folder for each
class where there are classes. The recipe is derived from both and printed with its reasons; what
you set yourself stays as you set it. Packs, scores the weights as they are, trains, scores again,
exports. --dry-run says the recipe, hours and memory. Without a recipe configs/adapt.yaml is read,
and the run is called adapt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job needs no installed package

from pipeline.job import main

if __name__ == "__main__":
    main(
        ["pack", "curate", "adapt", "pretrain", "evaluate", "export"],
        __doc__,
        shorthand={
            "weights": "model.init",
            "data": "data.source",
            "queries": "evaluate.queries",
        },
        words=("model.init", "data.source"),
        recipe="configs/adapt.yaml",
        implied=("adapt.enabled=true",),
    )
