"""The chain on one node and on three gives the same images, decisions, losses and weights."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.shards.shards import open_shards
from pipeline.track.journal import read_steps
from tests.cluster import consumed as notes
from tests.cluster.nodes import Cluster, cluster, token
from tests.cluster.pile import STEPS, Pile, arguments, make_pile, write_recipe
from tests.cluster.submit import submit
from tests.tiny import BATCH

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass
class Ran:
    """A chain on a cluster: its run folder, what it said, what it used, who did what."""

    run: Path
    console: str
    consumed: notes.Consumed
    where: dict[str, set[str]]  # kind of process: nodes on which one was seen


@contextmanager
def watched(made: Cluster, kinds: dict[str, str]) -> Iterator[dict[str, set[str]]]:
    """Inside, notes on which nodes processes of a kind (a word of their title) are seen."""
    seen: dict[str, set[str]] = {kind: set() for kind in kinds}
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            for node in made.nodes:
                for kind, word in kinds.items():
                    if node.find(word):
                        seen[kind].add(node.name)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def chain(made: Cluster, pile: Pile, folder: Path, *extra: str) -> Ran:
    kinds = {"training": "RayTrainWorker", "decoding": "_Decode", "evaluator": "EvaluatorActor"}
    given = arguments(pile, write_recipe(folder, curate=True), folder / "runs")
    with watched(made, kinds) as where:
        job = submit(made, "python", "jobs/run.py", *given, *extra)
        assert job.finish() == 0, job.text
    return Ran(folder / "runs" / "small", job.text, notes.consumed(made.env), where)


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Pile:
    return make_pile(tmp_path_factory.mktemp("pile"))


@pytest.fixture(scope="module")
def one(pile: Pile, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("one")
    with cluster(env=token() | notes.environment(folder)) as made:
        made.head(cpus=4)
        return chain(made, pile, folder)


@pytest.fixture(scope="module")
def three(pile: Pile, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("three")
    with cluster(env=token() | notes.environment(folder)) as made:
        made.head()
        made.add("decode", cpus=1)  # a group of two workers with a CPU each has no room here
        made.add("train", cpus=2)
        return chain(made, pile, folder)


def result(ran: Ran, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ran.run / stage / "_done.json").read_text())["result"]
    return found


def decisions(ran: Ran) -> pa.Table:
    """All decisions, one row an image, in the order of the files."""
    folder = ran.run / "curate" / "steps" / "decisions"
    files = sorted(folder.glob("*.parquet"))
    assert files
    return pa.concat_tables([pq.read_table(path) for path in files])


def losses(ran: Ran) -> dict[int, dict[str, float]]:
    rows = read_steps(ran.run / "metrics.jsonl", "pretrain")
    kinds = ("loss/", "optim/", "health/")
    return {
        step: {name: value for name, value in row.items() if name.startswith(kinds)}
        for step, row in rows.items()
        if "loss/total" in row
    }


def test_each_node_does_its_own_work(three: Ran) -> None:
    assert three.where["training"] == {"train"}
    assert three.where["decoding"] == {"decode"}
    assert three.where["evaluator"] == {"train"}  # the one with the most CPUs, never the head


def test_the_same_images(one: Ran, three: Ran, pile: Pile) -> None:
    for folder in ("shards", "curated", "pack/queries"):
        mine, other = (open_shards(str(ran.run / folder)) for ran in (one, three))
        assert (mine.digest, mine.rows) == (other.digest, other.rows)
    assert open_shards(str(one.run / "curated")).rows == result(one, "curate")["images"]
    packed = pile.files - pile.broken - pile.copies
    assert open_shards(str(one.run / "shards")).rows == packed
    for name in ("queries", "train"):
        bad = [pq.read_table(p.run / "pack" / f"bad_images_{name}.parquet") for p in (one, three)]
        columns = ["image_id", "reason", "source"]
        tables = [sorted(map(str, t.select(columns).to_pylist())) for t in bad]
        assert tables[0] == tables[1]
        assert len(tables[0]) == (pile.broken if name == "train" else 0)


def test_the_same_decisions(one: Ran, three: Ran, pile: Pile) -> None:
    mine, other = decisions(one), decisions(three)
    assert mine.num_rows == pile.files - pile.broken - pile.copies
    assert mine.equals(other)
    reasons = Counter(mine["reason"].to_pylist())
    assert reasons["flat"] == pile.flat
    assert reasons["duplicate_near"] >= pile.near
    assert reasons["leaks_evaluation"] >= pile.leaks


def test_the_same_losses(one: Ran, three: Ran) -> None:
    mine, other = losses(one), losses(three)
    assert list(mine) == list(range(STEPS))
    assert mine == other  # to the digit


def test_the_same_evaluation_and_weights(one: Ran, three: Ran) -> None:
    assert result(one, "evaluate") == result(three, "evaluate")
    for name in ("dinov2", "huggingface", "timm"):
        mine, other = (
            {p.name: p.read_bytes() for p in sorted((ran.run / "weights" / name).iterdir())}
            for ran in (one, three)
        )
        assert any(file.endswith(".safetensors") for file in mine)
        tensors = [
            {k: v for k, v in x.items() if k.endswith(".safetensors")} for x in (mine, other)
        ]
        assert tensors[0] == tensors[1]


def test_no_image_twice_and_none_left_out(one: Ran, three: Ran) -> None:
    """By what the workers were given, not by what was logged."""
    assert one.consumed.steps.keys() == three.consumed.steps.keys() == set(range(STEPS))
    for step, images in one.consumed.steps.items():
        assert sorted(images) == sorted(three.consumed.steps[step])
    kept = open_shards(str(one.run / "curated")).rows
    per_pass = kept // BATCH
    for ran in (one, three):
        assert ran.consumed.groups == [0]
        assert ran.consumed.repeated(per_pass) == 0
        assert ran.consumed.lost(per_pass, per_pass * BATCH) == 0
