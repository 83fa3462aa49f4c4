"""An evaluation card as one call: what `python jobs/evaluate.py` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.api.train import run_stages

if TYPE_CHECKING:
    from pipeline.card.card import Card


def evaluate(
    models: str | Path | Sequence[str | Path],
    data: str | Path = "",
    queries: str | Path = "",
    out: str | Path = "runs/evaluate",
    settings: Mapping[str, Any] | None = None,
) -> Card:
    """Scores models on images: `python jobs/evaluate.py models=[…] data=… queries=…`.

    Starts a Ray on this machine and ends it, or joins the one of `RAY_ADDRESS`. The same call
    again only reads the card.

    Args:
        models: runs, weights, `timm:<name>`, files in ONNX or `descriptor`; "" where `data` holds
            vectors, which are of a model.
        data: images with a folder for each class, shards, or vectors; "" with `evaluate.dense` in
            the settings.
        queries: images that are asked; "": each image of `data` by the others.
        out: the run folder: `run.folder` and `run.name` in one. The page is `evaluate/card.html`.
        settings: other fields by their names, e.g. `{"evaluate.scores": ["knn", "logistic"]}`.

    Returns:
        the card: `verdict.text`, and of each of `contenders` the `results` by score name.

    Raises:
        PipelineError: for whatever the user can mend.
        SystemExit: after Ctrl-C or SIGTERM.
    """
    listed = [models] if isinstance(models, str | Path) else list(models)
    named: dict[str, Any] = {"evaluate.models": [str(one) for one in listed if str(one)]}
    places = {"evaluate.reference": str(data), "evaluate.queries": str(queries)}
    fields = {name: value for name, value in (named | places).items() if value}
    folder, _ = run_stages("evaluate", ("pack", "evaluate"), out, fields, "", settings or {})
    from pipeline.card.files import read_card

    return read_card(folder)
