"""The recipe of a training run that takes seconds, for tests that start whole jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

BATCH = 16
STEPS = 40
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"shuffle_images": 32, "row_group_images": 16},
    "augment": {"global_size": 16, "local_size": 8, "local_crops": 2},
    "model": {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "patch_size": 4,
        "registers": 1,
        "drop_path": 0.1,
    },
    "head": {"prototypes": 64, "bottleneck": 16, "hidden": 32},
    "optim": {"steps": STEPS, "global_batch_size": BATCH},
    "train": {
        "workers": 2,
        "log_every": 1,
        "save_every": 5,
        "eval_every": 20,
        "precision": "float32",
    },
    "evaluate": {"batch_size": 32},
    "track": {"enabled": False},
    "resources": {"threads": 1},
}


def write_tiny(path: Path, **changes: dict[str, Any]) -> Path:
    """Writes the recipe; gives its path.

    Args:
        path: of the file, whose name is the run's; its folder is made.
        changes: fields of sections, over what is above.
    """
    names = [*SECTIONS, *(name for name in changes if name not in SECTIONS)]
    recipe = {name: SECTIONS.get(name, {}) | changes.get(name, {}) for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("# Tests: small images, seconds of training.\n" + yaml.safe_dump(recipe))
    return path
