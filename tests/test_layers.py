"""The import table of the design, held against every source, and the rules against planted sins."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests import layers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipeline"
SOURCES = {layers.module_name(path, PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}
FULL = [f"pipeline.{name}" for name in SOURCES]
JOBS = sorted((ROOT / "jobs").glob("*.py"))
HEAVY = ("torch", "ray", "mlflow")
# What a driver may load before it knows what to do; none of it may cost seconds.
LIGHT = [
    "errors", "log", "config.config", "config.load", "schedule", "plan.plan", "storage.run_folder",
    "driver.mailbox", "driver.cluster", "job", "track", "stream.order",
]  # fmt: skip


def imports(path: Path) -> list[layers.Import]:
    return layers.imports_of(path.read_text(), FULL)


def test_a_module_imports_only_what_the_row_of_its_room_allows() -> None:
    problems = [
        problem
        for module, path in SOURCES.items()
        for problem in layers.violations(module, imports(path), layers.rows_of(module))
    ]
    assert not problems, "\n".join(problems)


def test_no_arrow_goes_upwards() -> None:
    assert layers.upward() == []
    planted = [layers.row("a", "b"), layers.row("b")]
    assert layers.upward(planted) == [
        "a names b, which stands below it",
        "a names b.*, which stands below it",
    ]


def test_a_job_is_a_command_line_and_nothing_more() -> None:
    assert JOBS
    for path in JOBS:
        problems = layers.violations(f"jobs.{path.stem}", imports(path), layers.JOBS)
        assert not problems, "\n".join(problems)
        assert len(path.read_text().splitlines()) <= 60, path


def test_no_folder_module_or_function_is_larger_than_a_reader_takes_in(tmp_path: Path) -> None:
    # one step of training: networks, batch, rates and losses are nouns of their own already
    allowed = "train_step has 9 parameters"
    problems = [x for x in layers.oversized(PACKAGE) if allowed not in x]
    assert not problems, "\n".join(problems)
    room = tmp_path / "pipeline" / "room"
    room.mkdir(parents=True)
    for number in range(16):
        (room / f"m{number:02d}.py").write_text("x = 1\n" * (351 if number == 3 else 350))
    (room / "m05.py").write_text("class A:\n    def f(self, a, b, c, d, e, *, f, g, h): ...\n")
    (room / "m06.py").write_text("class A:\n    def f(self, a, b, c, d, e, *, f, g): ...\n")
    assert layers.oversized(tmp_path / "pipeline") == [
        "pipeline/room: 16 modules",
        "pipeline/room/m03.py: 351 lines",
        "pipeline/room/m05.py:2: f has 8 parameters",
    ]


def test_the_table_is_the_designs() -> None:
    """Whoever widens a row meets the rules that the rows come from."""

    def where(library: str, inside: bool) -> set[str]:
        return {
            name
            for r in layers.TABLE
            if library in r.others + (r.others_inside if inside else [])
            for name in r.modules
        }

    assert where("mlflow", inside=False) == set()
    assert where("mlflow", inside=True) == {"track.embedder", "track", "track.*"}
    assert where("ray", inside=False) == {
        "train.rank_zero",
        "train",
        "train.*",
    }
    light = {"errors", "log", "schedule", "config", "plan", "storage", "job", "uri"}
    assert not light & (where("torch", inside=True) | where("ray", inside=True))
    for maths in ("views.crops", "model.vit", "loss.dino", "evaluate.neighbours.knn", "train.step"):
        allowed = layers.rows_of(maths)
        assert allowed
        assert not {"config", "plan", "log", "driver"} & {*allowed.ours, *allowed.inside}


def test_every_row_is_for_something() -> None:
    used = {id(layers.rows_of(name)) for name in SOURCES}
    idle = [row.modules for row in layers.TABLE if id(row) not in used]
    assert not idle


def test_imports_make_no_circle() -> None:
    graph = {
        f"pipeline.{name}": {
            one.name for one in imports(path) if one.top_level and one.name.startswith("pipeline.")
        }
        for name, path in SOURCES.items()
    }
    assert not layers.cycles(graph)


PLANTED = [
    ("loss.koleo", "import ray", "must not import ray"),
    ("loss.koleo", "def f():\n    import ray.train", "must not import ray"),
    ("loss.dino", "from pipeline.model.vit import VisionTransformer", "pipeline.model.vit"),
    (
        "model.vit",
        "from pipeline.config.config import Config",
        "must not import pipeline.config.config",
    ),
    ("model.vit", "from pipeline import config", "must not import pipeline.config"),
    ("views.crops", "from pipeline import plan as derived", "must not import pipeline.plan"),
    ("views.draws", "import torch", "must not import torch"),
    ("stream.decoder", "import torch", "must not import torch at the top of the file, only inside"),
    ("stream.dealer", "import ray", "must not import ray at the top of the file, only inside"),
    ("evaluate.neighbours.knn", "def f():\n    import mlflow", "must not import mlflow"),
    ("train.step", "import ray.train as t", "must not import ray"),
    ("train.rank_zero", "from pipeline.track.tracker import Tracker", "at the top of the file"),
    ("train.rank_zero", "def f():\n    from pipeline.track import sender", "pipeline.track.sender"),
    ("train.checkpoint.state", "import ray", "must not import ray"),
    ("track.tracker", "import mlflow", "must not import mlflow at the top of the file"),
    ("track.tracker", "class A:\n    import mlflow", "must not import mlflow at the top"),
    ("track.sender", "def f():\n    from pipeline.config.config import Config", "pipeline.config"),
    ("track.embedder", "from pipeline.model.weights import load_backbone", "at the top"),
    ("config.config", "import torch", "must not import torch"),
    ("schedule", "import numpy", "must not import numpy"),
    ("errors", "from pipeline.log import configure", "must not import pipeline.log"),
    ("stages.pack", "from jobs.pack import main", "nothing imports jobs"),
    ("stages.pack", "import ray", "must not import ray at the top of the file"),
    ("model.vit", "from ..config import Config", "write the full name"),
    ("model.vit", "import importlib\nimportlib.import_module('ray')", "must not import ray"),
    ("model.vit", "import importlib\nname = 'r'\nimportlib.import_module(name)", "<computed>"),
    ("model.vit", "try:\n    import ray\nexcept ImportError:\n    pass", "must not import ray"),
    ("loss", "from pipeline.model.vit import VisionTransformer", "pipeline.model.vit"),
    ("new.idea", "", "no row of the table"),
]
INNOCENT = [
    ("stream.decoder", "def f():\n    import ray, torch"),
    (
        "driver.cluster",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pipeline.config.config",
    ),
    ("train.rank_zero", "def f():\n    from pipeline.track.tracker import tracker_from"),
    ("track.writer", "def f():\n    from mlflow import MlflowClient"),
    ("track.embedder", "def f():\n    from pipeline.model.weights import load_backbone"),
    ("evaluate.teacher", "from pipeline.shards.shards import open_shards"),
    ("schedule", "import math\nfrom collections.abc import Sequence"),
    ("model.vit", "'import ray'\n# import ray"),
]


def violations(module: str, source: str) -> list[str]:
    return layers.violations(module, layers.imports_of(source, FULL), layers.rows_of(module))


def test_a_planted_violation_is_reported() -> None:
    for module, source, sentence in PLANTED:
        problems = violations(module, source)
        assert len(problems) == 1, f"{module}, {source!r}: {problems}"
        assert sentence in problems[0], f"{module}, {source!r}: {problems}"


def test_what_is_allowed_is_not_reported() -> None:
    problems = [said for module, source in INNOCENT for said in violations(module, source)]
    assert not problems, "\n".join(problems)


def test_a_planted_circle_is_reported() -> None:
    assert layers.cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not layers.cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_light_modules_load_nothing_heavy() -> None:
    code = (
        "import sys, json, importlib\n"
        "found = {}\n"
        f"for name in ['pipeline', *('pipeline.' + x for x in {LIGHT!r})]:\n"
        "    importlib.import_module(name)\n"
        f"    found[name] = [x for x in {HEAVY!r} if x in sys.modules]\n"
        "print(json.dumps(found))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(shown.stdout)
    assert not {name: loaded for name, loaded in found.items() if loaded}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_help_answers_at_once(path: Path, record_property: pytest.RecordProperty) -> None:
    # `-X importtime` names every module that was loaded, on stderr
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", path, "--help"], capture_output=True, text=True
    )
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime  # whoever else works
    assert shown.returncode == 0
    assert shown.stdout.strip()
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.split("\n")
    }
    assert "pathlib" in loaded
    assert not loaded & set(HEAVY)
    record_property("seconds", seconds)
    assert seconds < 5, f"{seconds:.1f} s"  # 0.3 s is usual


def test_help_of_the_chain_lists_the_fields() -> None:
    shown = subprocess.run(
        [sys.executable, ROOT / "jobs" / "run.py", "--help=all"],
        capture_output=True,
        text=True,
        check=True,
    )
    for section in ("data", "optim", "resources"):
        assert f"\n{section}\n" in shown.stdout
    assert "python jobs/run.py" in shown.stdout


def test_names_of_test_files_are_unique() -> None:
    """Folders of tests are no packages, so two files of one name are one module to pytest."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
