"""Fine-tuning as one call: what `python jobs/finetune.py` does, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.api.train import run_stages


@dataclass(frozen=True)
class Finetuned:
    """A classifier that is finished.

    Attributes:
        folder: the run folder, or the working copy of a remote one.
        result: of the stage; `text` says it in a sentence.
    """

    folder: Path
    result: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Top-1 on the queries, or on the held-out part; `result["interval"]` is around it."""
        return float(self.result["finetune_top1"])

    @property
    def weights(self) -> Path:
        """The folder that transformers or timm load."""
        return self.folder / "finetune" / str(self.result["form"])

    @property
    def class_names(self) -> list[str]:
        """By the number of the class."""
        return (self.weights / "classes.txt").read_text().splitlines()


def finetune(
    source: str | Path,
    out: str | Path,
    model: str | Path,
    queries: str | Path = "",
    settings: Mapping[str, Any] | None = None,
) -> Finetuned:
    """Fine-tunes a model on labelled images: `python jobs/finetune.py model=… data=… queries=…`.

    Starts a Ray on this machine and ends it, or joins the one of `RAY_ADDRESS`. The same call
    again goes on where the last one ended; a finished run is only read.

    Args:
        source: images, as `data.source`: a folder with one folder a class, parquet, a URI.
        out: the run folder: `run.folder` and `run.name` in one.
        model: a run, weights or `timm:<name>`.
        queries: images to score; default: a fifth of each class is held out.
        settings: other fields by their names, e.g. `{"finetune.tune": "head"}`.

    Raises:
        PipelineError: for whatever the user can mend.
        SystemExit: after Ctrl-C or SIGTERM, which end training in a checkpoint.
    """
    fields = {"data.source": str(source), "finetune.model": str(model)}
    fields |= {"evaluate.queries": str(queries)} if queries else {}
    stages = ("pack", "finetune")
    folder, results = run_stages("finetune", stages, out, fields, "", settings or {})
    return Finetuned(folder, results["finetune"])
