"""The commands: help of one screen, fields that exist, `raydino` beside the job files."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline import job, log
from pipeline.commands.help import WIDTH, _cut, everything, section
from pipeline.commands.table import COMMANDS
from pipeline.config.load import field_paths
from pipeline.errors import ConfigError
from pipeline.stages.chain import ORDER

ROOT = Path(__file__).parents[2]
SCREEN = 24  # lines of a terminal
FIELDS = {path for path, _ in field_paths()}


TALK = """log.configure()
for number in range(20000):
    logging.getLogger("pipeline").info("line %d of many", number)"""


@pytest.fixture(autouse=True)
def as_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.TYPED, "as_command", False)


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["raydino", *words])
    job.raydino()


def test_each_job_file_is_a_command_and_each_command_has_a_file() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(COMMANDS)
    for name, command in COMMANDS.items():
        source = (ROOT / "jobs" / f"{name}.py").read_text()
        assert f'command("{name}")' in source and command.what in source
        assert len(source.splitlines()) < 20


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_one_screen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    job.command(name, ["--help"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= SCREEN
    assert max(map(len, shown)) <= WIDTH
    command = COMMANDS[name]
    assert shown[0] == command.what and 2 <= len(command.examples) <= 5
    assert all(f"  {example}" in shown for example in command.examples)
    assert set(command.fields) <= FIELDS and set(command.words) <= FIELDS
    assert set(command.shorthand.values()) <= FIELDS
    assert set(command.stages) <= {*ORDER, "doctor", "serve", "start", "sync"}


def test_help_all_has_every_field_and_help_of_a_section_its_own() -> None:
    text = everything(COMMANDS["run"])
    for path in FIELDS:
        assert f"\n  {path.rpartition('.')[2]}" in text, path
    data = section("data")
    assert "\n  max_bad_fraction" in data and "global_batch_size" not in data
    with pytest.raises(ConfigError, match="no section optm") as error:
        section("optm")
    assert error.value.hint == "did you mean --help=optim?"


def test_a_description_ends_with_a_clause_or_a_word() -> None:
    assert _cut("a folder, an archive, a table", 23) == "a folder, an archive"
    assert _cut("a long sentence without any clause", 20) == "a long sentence…"
    assert _cut("short", 20) == "short"


def test_raydino_has_the_commands_and_speaks_of_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch)
    shown = capsys.readouterr().out
    assert all(f"raydino {name} " in shown for name in COMMANDS)
    assert all(one.what in shown for one in COMMANDS.values())
    assert all(len(line) <= 100 for line in shown.splitlines())
    assert len(shown.splitlines()) <= SCREEN
    typed(monkeypatch, "run", "--help")
    shown = capsys.readouterr().out
    assert "raydino run configs/demo.yaml" in shown and "jobs/" not in shown
    with pytest.raises(SystemExit):
        typed(monkeypatch, "adapt", "--dry-run", "track.enabled=false")
    assert "raydino adapt WEIGHTS PHOTOS/" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        typed(monkeypatch, "rum")
    assert ended.value.code == 2
    assert "did you mean raydino run?" in capsys.readouterr().err


@pytest.mark.jobs
def test_the_wheel_works_outside_of_a_clone(tmp_path: Path) -> None:
    """Built, unpacked as an installer does, and started from another folder."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    home = tmp_path / "site"
    target = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(home), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *target], check=True, capture_output=True)
    assert (home / "pipeline" / "configs" / "demo.yaml").is_file()
    places = {path.name for path in home.iterdir()}
    assert not places & {"tests", "jobs", "configs", "benchmarks"}

    def said(*words: str) -> str:
        script = f"import sys; sys.path.insert(0, {str(home)!r})\n"
        script += "import pipeline.job as job; assert job.__file__.startswith(sys.path[0])\n"
        script += f"sys.argv = ['raydino', *{list(words)!r}]; job.raydino()"
        command = [sys.executable, "-c", script]
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert shown.returncode == 0, shown.stderr
        return shown.stdout

    assert "raydino start photos/" in said("--help")
    shown = said("run", "demo", "--dry-run", "track.enabled=false")
    assert "recipe      " in shown and "run         demo in " in shown
    shown = said("pack", "configs/curate.yaml", "data.source=builtin:photos", "--dry-run")
    assert "run         curate in" in shown
    (script,) = home.glob("bin/raydino")
    assert "pipeline.job" in script.read_text()


def test_no_name_on_an_index_is_suggested_that_is_not_ours() -> None:
    """The project is on no package index: whoever reads `pip install raydino` would get another."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("pipeline/**/*.py")]
    texts += [*ROOT.glob("cluster/*"), *ROOT.glob("*.toml")]
    for path in texts:
        if path.is_file():
            text = path.read_text().replace("`pip install raydino`", "")
            assert "pip install raydino" not in text and "pip install 'raydino" not in text, path


def test_extras_that_are_named_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named: set[str] = set()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("pipeline/**/*.py")]:
        for group in re.findall(r"['\"`]\.\[([a-z,]+)\]|extra[s]? `([a-z]+)`", path.read_text()):
            named |= {name for names in group for name in names.split(",") if name}
    assert {"onnx", "search", "serve"} <= named <= set(extras)


@pytest.mark.parametrize("script", ["job.command('run', ['--help=all'])", TALK])
def test_a_reader_that_leaves_is_no_error(script: str) -> None:
    """`python jobs/run.py --help=all | head -1`, and the same of a job's log."""
    code = f"import logging, sys\nfrom pipeline import job, log\n{script}\n"
    code += "print('done', file=sys.stderr)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as talker:
        assert talker.stdout is not None and talker.stderr is not None
        talker.stdout.readline()
        talker.stdout.close()
        assert talker.stderr.read() == "done\n"
        assert talker.wait(60) == 0
