"""Every config field is read by the code: a field that does nothing is a promise not kept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import create_model

from pipeline.config.config import Config
from pipeline.config.load import field_paths
from pipeline.config.training import Optim
from tests.config.config_reads import Shape, reads

PACKAGE = Path(__file__).parents[2] / "pipeline"
CONFIG = [path.read_text() for path in sorted(PACKAGE.glob("config/*.py"))]
SHAPE = Shape(Config, CONFIG)
SOURCES = {
    str(path.relative_to(PACKAGE.parent)): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent.name != "config"
}

FOUND = reads(SOURCES, SHAPE)


def unread(sources: dict[str, str], shape: Shape) -> set[str]:
    return shape.fields - set(reads(sources, shape))


def test_every_field_is_read() -> None:
    assert sorted(SHAPE.fields - set(FOUND)) == []


def test_the_finder_knows_every_field() -> None:
    assert {path for path, _ in field_paths()} == SHAPE.fields


@pytest.mark.long
def test_a_planted_field_is_reported() -> None:
    optim = create_model("Optim", __base__=Optim, planted=(int, 1))
    config = create_model("Config", __base__=Config, optim=(optim, optim()))
    shape = Shape(config, CONFIG)
    assert unread(SOURCES, shape) == {"optim.planted"}
    # the bare word elsewhere, or in a whole dump, is no reading
    noise = "planted = 1\nother.planted\n'optim.planted'\n# config.optim.planted\n"
    noise += "def f(config: Config):\n    fingerprint(config.model_dump())\n    config.planted\n"
    assert unread(SOURCES | {"noise": noise}, shape) == {"optim.planted"}
    used = "def f(config: Config):\n    return config.optim.planted\n"
    assert unread(SOURCES | {"used": used}, shape) == set()


@pytest.mark.long
def test_without_its_readers_a_field_is_reported() -> None:
    """Rub out what reads a field, in the files that do, and it is missed."""
    for field in sorted(SHAPE.fields):
        touched = {place.rpartition(":")[0] for place in FOUND[field]}
        files = {name: SOURCES[name] for name in touched}
        assert field in reads(files, SHAPE), field
        properties = [name for (_, name), read in SHAPE.properties.items() if field in read]
        readers = [field.rpartition(".")[2], *properties, "model_dump", "getattr"]
        word = re.compile(rf"\b({'|'.join(readers)})\b")
        files = {name: word.sub("rubbed_out", text) for name, text in files.items()}
        assert field not in reads(files, SHAPE), field


HEAD = "def f(config: Config, plan: Plan, optim: Optim, data):\n    "
EXPORT = {path for path, _ in field_paths() if path.startswith("export.")}
READ = [
    ("config.optim.lr", {"optim.lr"}),
    ("plan.config.optim.lr", {"optim.lr"}),
    ("self.plan.config.optim.lr", {"optim.lr"}),
    ("optim.lr", {"optim.lr"}),
    ("o = config.optim; o.lr", {"optim.lr"}),
    ("o, e = config.optim, config.evaluate; o.lr; e.k", {"optim.lr", "evaluate.k"}),
    ("c = plan.config; o = c.optim; x = [o.lr for _ in y]", {"optim.lr"}),
    ("g = lambda: config.optim.lr", {"optim.lr"}),
    ("x = config.optim.lr if config.train.compile else 1", {"optim.lr", "train.compile"}),
    ("config.model.dimensions", {"model.size", "model.width", "model.depth", "model.heads"}),
    ("Spec(**config.export.model_dump())", EXPORT),
    ("d = config.export.model_dump()\n    Spec(**d)", EXPORT),
    ("Spec(**config.teacher.model_dump(include={'momentum'}))", {"teacher.momentum"}),
    ("Spec(**config.teacher.model_dump(include=set(SOME)))", {"teacher.momentum"}),
    ("Spec(**config.export.model_dump(exclude={'checkpoint'}))", EXPORT - {"export.checkpoint"}),
    ("Spec(**config.teacher.model_dump(include=unknown))", set()),
    ("config.export.model_dump()", set()),
    ("fingerprint(config.teacher.model_dump(include=set(SOME)))", set()),
    ("[getattr(config.teacher, n) for n in ('momentum', 'temperature')]",
     {"teacher.momentum", "teacher.temperature"}),
    ("getattr(config.teacher, unknown)", set()),
    ("for n in SOME: getattr(config.teacher, n)", {"teacher.momentum"}),
    ("named(config).optim.lr", {"optim.lr"}),
    ("config = config.model_copy(update={}); config.optim.lr", {"optim.lr"}),
    ("data.source; lr; 'optim.lr'", set()),
    ("config = other(); config.optim.lr", set()),
    ("optim = torch.optim; optim.lr", set()),
    ("config.optim.lr = 1", set()),
    ("torch.optim.lr", set()),
]  # fmt: skip


def test_the_finder_follows_names() -> None:
    before = "SOME = ('momentum',)\ndef named(c: Config) -> Config:\n    return c\n" + HEAD
    for body, expected in READ:
        assert set(reads({"x.py": f"{before}{body}\n"}, SHAPE)) == expected, body
