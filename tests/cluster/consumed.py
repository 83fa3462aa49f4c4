"""Which images each step of a job was trained on, noted where the worker takes its batches.

A job in a cluster is other processes on other nodes, so the note is taken by Python's own start-up
hook: `environment` puts a `sitecustomize` on the path of all nodes, which wraps
`pipeline.stream.worker.batches` as `pipeline.train.worker` sees it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HOOK = '''\
"""Notes what training workers take: one line a micro batch, into a file of each process."""
import json, os, sys, time
from importlib.machinery import PathFinder

TARGET = "pipeline.train.worker"


class Hook:
    def find_spec(self, name, path=None, target=None):
        if name != TARGET:
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.batches = noted(module.batches)
            if "NAN_STEP" in os.environ:
                module.view_maker = poisoned(module.view_maker)

        spec.loader.exec_module = exec_module
        return spec


def noted(batches):
    def wrapped(request, **options):
        folder = os.environ["CONSUMED"]
        begin = time.time()
        path = os.path.join(folder, f"{begin:.6f}-{request.rank}-{os.getpid()}.jsonl")
        with open(path, "w", buffering=1) as file:
            head = {"group_id": request.group_id, "rank": request.rank,
                    "first": request.first_step, "begin": begin}
            file.write(json.dumps(head) + "\\n")
            for batch in batches(request, **options):
                ids = [bytes(row.numpy()).hex() for row in batch.image_ids]  # bad ones too
                time.sleep(float(os.environ.get("STEP_S", "0")))  # steps of a larger network
                file.write(json.dumps({"time": time.time(), "ids": ids}) + "\\n")
                yield batch
    return wrapped


def poisoned(view_maker):
    calls = iter(range(10**9))

    def wrapped(*arguments):
        make = view_maker(*arguments)

        class Poisoned(type(make)):
            def __call__(self, batch):
                views = super().__call__(batch)
                if next(calls) == int(os.environ["NAN_STEP"]) and os.environ["RANK"] == "1":
                    views.global_views[0, 0, 0, 0] = float("nan")  # one pixel of one of two workers
                return views

        make.__class__ = Poisoned
        return make
    return wrapped


sys.meta_path.insert(0, Hook())
'''


def environment(folder: Path) -> dict[str, str]:
    """For the nodes of a cluster: jobs on it leave their notes in `folder`."""
    code = folder / "hook"
    code.mkdir(parents=True)
    (code / "sitecustomize.py").write_text(HOOK)
    (folder / "notes").mkdir()
    return {"PYTHONPATH": str(code), "CONSUMED": str(folder / "notes")}


@dataclass(frozen=True)
class Consumed:
    """What a run was trained on.

    Attributes:
        steps: the images of each step in what counts: of the last group that did the step.
        taken: steps that some group took, those that were done again counted again.
        groups: first step of each group of workers, in order.
        times: when the last worker took the batch of a step that counts, seconds since 1970.
    """

    steps: dict[int, list[str]]
    taken: int
    groups: list[int]
    times: dict[int, float]

    def repeated(self, per_pass: int) -> int:
        """Images that a pass was trained on twice."""
        return sum(n - 1 for images in self._passes(per_pass) for n in images.values())

    def lost(self, per_pass: int, images: int) -> int:
        """Images of whole passes that no step was trained on, of the `images` that a pass uses."""
        whole = self._passes(per_pass)[: len(self.steps) // per_pass]
        return sum(images - len(found) for found in whole)

    def _passes(self, per_pass: int) -> list[Counter[str]]:
        found: dict[int, Counter[str]] = {}
        for step, images in self.steps.items():
            found.setdefault(step // per_pass, Counter()).update(images)
        return [found[number] for number in sorted(found)]


def consumed(notes: Mapping[str, str] | Path, micro_batches: int = 0) -> Consumed:
    """Reads the notes of a run.

    Args:
        notes: the environment that its cluster had, or the folder.
        micro_batches: of a step, over all workers; 0: one for each worker.
    """
    folder = notes if isinstance(notes, Path) else Path(notes["CONSUMED"])
    groups: dict[str, list[tuple[dict[str, float], list[dict[str, list[str]]]]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if lines:
            groups.setdefault(lines[0]["group_id"], []).append((lines[0], lines[1:]))
    ordered = sorted(groups.values(), key=lambda group: min(head["begin"] for head, _ in group))
    steps: dict[int, list[str]] = {}
    times: dict[int, float] = {}
    taken = 0
    for group in ordered:
        first = int(group[0][0]["first"])
        accumulation = max(1, micro_batches // len(group))
        done = min(len(lines) for _, lines in group) // accumulation
        taken += done
        for later in [step for step in steps if step >= first]:
            del steps[later], times[later]
        for offset in range(done):
            rows = [
                line
                for _, lines in group
                for line in lines[offset * accumulation : (offset + 1) * accumulation]
            ]
            steps[first + offset] = [name for row in rows for name in row["ids"]]
            times[first + offset] = max(float(row["time"]) for row in rows)  # type: ignore[arg-type]
    firsts = [int(group[0][0]["first"]) for group in ordered]
    return Consumed(steps, taken, firsts, times)
