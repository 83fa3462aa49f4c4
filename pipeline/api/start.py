"""The recipe that fits a folder and a machine as one call: what `python jobs/start.py` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.api.train import as_words, say_on_console

if TYPE_CHECKING:
    from pipeline.start.start import Started


def start(
    source: str | Path,
    recipe: str | Path = "",
    weights: str | Path = "",
    settings: Mapping[str, Any] | None = None,
) -> Started:
    """Looks at images and machine, and writes the recipe that fits: `python jobs/start.py source`.

    `started = start("photos/")`, then `train(started.source, out, recipe=started.recipe)` runs it.
    Where `photos/` has `train/` and `val/`, the source is `photos/train`: `val/` stays unseen.

    Args:
        source: images, as `data.source`: a folder, archives, parquet, a URI.
        recipe: the file to write; default: the folder's name and `.yaml`, here.
        weights: to begin from, as `model.init`; default: none.
        settings: other fields by their names, e.g. `{"start.gpu_gb": 24, "optim.passes": 50}`;
            they stand in the recipe as they are given.

    Raises:
        PipelineError: there are no images, or too few for random weights; the file is there and
            was written by somebody else.
    """
    from pipeline.config.load import load
    from pipeline.start.start import start as begin

    fields = {"data.source": source, "start.recipe": recipe, "model.init": weights}
    named = {name: value for name, value in fields.items() if str(value)} | dict(settings or {})
    config = load(as_words(named))
    say_on_console()
    return begin(config)
