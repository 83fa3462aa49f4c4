"""Curations that were made before: what new images are compared with and added to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.curate.copies.pairs import INDEX_STEPS
from pipeline.curate.steps.steps import Step, Steps
from pipeline.embed.embedders import EmbedderSpec
from pipeline.errors import DataError
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import read_json, read_mark
from pipeline.uri import Place, is_uri, join, public

# Steps whose tables are read when images are added, or looked up.
READ = ("fingerprint", "decisions", *INDEX_STEPS)


@dataclass(frozen=True)
class Earlier:
    """A finished curation that images are added to.

    Attributes:
        run: its run folder.
        result: of its stage: thresholds, penalty, embedder, where its shards are, keys of steps.
    """

    run: str
    result: dict[str, Any]

    @property
    def root(self) -> Place:
        """Folder of its steps."""
        return join(self.run if is_uri(self.run) else Path(self.run), "curate", "steps")

    def overwritten(self) -> bool:
        """Whether some of its tables are not those that its result was made of: it was curated anew
        since, which did not finish. Results that do not say which they were made of pass.
        """
        fs, path = resolve_uri(str(self.root))
        for step, key in self.result.get("steps", {}).items():
            now = read_json(fs, f"{path}/{step}/_key.json")
            if now is not None and now != {"key": key}:
                return True
        return False

    def decisions(self) -> Step:
        """Its decisions.

        Raises:
            DataError: there are none.
        """
        decisions = Steps(self.root).stored("decisions")
        if not decisions.tables:
            raise DataError(f"{public(self.run)} has no decisions", "curate it again")
        return decisions


def keys_of(results: Iterable[Step]) -> dict[str, str]:
    """For the result of a curation: keys of the steps that later ones read."""
    return {step.name: step.key for step in results if step.name in READ}


def earlier_runs(run: str) -> list[Earlier]:
    """The curation in a run folder, the one that it was added to, and so on.

    Raises:
        DataError: one is not there or not finished, or was curated anew and that not finished.
    """
    runs: list[Earlier] = []
    while run and run not in (one.run for one in runs):
        place = join(run if is_uri(run) else Path(run), "curate", "_done.json")
        done = read_mark(*resolve_uri(str(place)))
        if not isinstance(done.get("result"), dict):
            raise DataError(
                f"{public(run)} holds no finished curation",
                "name a run folder (runs/<name>) that jobs/curate.py or jobs/run.py has curated",
            )
        runs.append(Earlier(run, done["result"]))
        if runs[-1].overwritten():
            raise DataError(
                f"{public(run)} was curated anew, and that did not finish: its tables are not "
                "those of its curated set",
                "start that curation again, so that it finishes",
            )
        run = str(done["result"].get("against", ""))
    return runs


def check_inputs(one: Earlier, spec: EmbedderSpec) -> None:
    """Refuses to compare vectors of images that were made ready in another way, by one network.

    Args:
        one: an earlier curation.
        spec: the same network as there.

    Raises:
        DataError: the images' size, mean or deviation is another.
    """
    then, now = one.result["embedder"], spec.identity
    if then == now:
        return
    names = ("image size", "mean", "std", "range of values")
    pairs = zip(names, then[2:], now[2:], strict=False)
    differ = [f"{name} {b or 'its own'}, there {a or 'its own'}" for name, a, b in pairs if a != b]
    raise DataError(
        f"{public(one.run)} was curated with the same copy embedder, but its images were made "
        f"ready in another way ({'; '.join(differ) or 'it does not say how'})",
        "set curate.image_size, augment.mean and augment.std as they were there, or curate anew",
    )
