"""What a report is made of: read from a run folder, in one place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.card.card import Card
from pipeline.card.examples.kept import FILE, Examples, read_examples
from pipeline.card.files import CARD, EVALUATE, read_card
from pipeline.config.config import Config
from pipeline.errors import PipelineError
from pipeline.storage.run_folder import RunFolder
from pipeline.track import journal, state
from pipeline.uri import public

log = logging.getLogger("pipeline")

Steps = dict[int, dict[str, float]]


@dataclass(frozen=True)
class RunFacts:
    """A run, as its folder tells it.

    Attributes:
        config: the recipe.
        folder: of the run.
        results: of finished stages by name, in the order of the chain.
        card: of the evaluation, without what each image adds; None: there is none.
        examples: images that show what the model does.
        change: what an adaptation has changed, as columns of a table; empty where nothing was
            adapted.
        change_note: what to know of these.
    """

    config: Config
    folder: RunFolder
    results: Mapping[str, Mapping[str, Any]]
    card: Card | None = None
    examples: Examples = field(default_factory=Examples)
    change: Mapping[str, list[Any]] = field(default_factory=dict)
    change_note: str = ""

    @classmethod
    def of(
        cls,
        config: Config,
        folder: RunFolder,
        results: Mapping[str, Mapping[str, Any]],
        change: Mapping[str, list[Any]] | None = None,
        change_note: str = "",
    ) -> RunFacts:
        """With what lies in the folder; a damaged card is said and left out."""
        there = {name: result for name, result in results.items() if result}
        card, examples = None, Examples()
        if "evaluate" in there and (folder.path / EVALUATE / CARD).is_file():
            try:
                card = read_card(folder.path / EVALUATE, terms=False)
            except PipelineError as error:
                log.warning("report      without the card: %s", error.what)
        if card and (folder.path / EVALUATE / FILE).is_file():
            examples = read_examples(folder.path / EVALUATE)
        return cls(config, folder, there, card, examples, change or {}, change_note)

    @property
    def path(self) -> Path:
        """Where the files are on this machine."""
        return self.folder.path

    @property
    def place(self) -> str:
        """The run folder as people reach it."""
        return public(self.folder.at())

    def result(self, stage: str) -> Mapping[str, Any]:
        """What a stage said at its end; empty where it did not run."""
        return self.results.get(stage, {})

    def steps(self, stage: str) -> Steps:
        """The metrics of a stage by step."""
        return journal.read_steps(self.path / journal.FILE_NAME, stage)

    def stages(self) -> list[str]:
        """All that wrote into the journal, in their order, without the pipeline itself."""
        events = journal.read(self.path / journal.FILE_NAME)
        names = dict.fromkeys(str(event["run"]) for _, event in events)
        return [name for name in names if name != "pipeline"]

    def seconds(self) -> dict[str, float]:
        """What each stage took, by the journal: of all its starts, from the opening to the end."""
        took: dict[str, float] = {}
        begun: dict[str, int] = {}
        last: dict[str, int] = {}
        for _, event in journal.read(self.path / journal.FILE_NAME):
            name, when = str(event["run"]), int(event["ts"])
            if "open" in event and "attempt" in event:
                if name in begun:  # an earlier start that did not come to its end
                    took[name] = took.get(name, 0) + (last[name] - begun[name]) / 1e3
                begun[name] = when
            last[name] = when
            if "end" in event and name in begun:
                took[name] = took.get(name, 0) + (when - begun.pop(name)) / 1e3
        for name, when in begun.items():
            took[name] = took.get(name, 0) + (last[name] - when) / 1e3
        took.pop("pipeline", None)
        return took

    def datasets(self, stage: str) -> dict[str, Mapping[str, Any]]:
        """What a stage said last of each set that it read, by the name of the set."""
        events = journal.read(self.path / journal.FILE_NAME, having=b'"dataset"')
        sets = (
            event["dataset"] for _, event in events if event["run"] == stage and "dataset" in event
        )
        return {str(one["name"]): one for one in sets}

    def training_images(self) -> int:
        """How many were trained on; 0 where nothing was."""
        return int(self.datasets("pretrain").get("train", {}).get("images", 0))

    def mlflow(self) -> str:
        """The page of the run on its MLflow server; "" where no address is known."""
        if not (self.path / state.FILE_NAME).is_file():
            return ""
        for known in state.State(self.path).servers.values():
            run = known.runs.get("pipeline", "")
            if known.uri.startswith("http") and known.experiment_id and run:
                page = f"{public(known.uri)}/#/experiments/{known.experiment_id}/runs/{run}"
                return f"{page}?workflowType=machine_learning"
        return ""
