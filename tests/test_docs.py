"""The documentation says what there is: commands that parse, fields, files and links that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import api
from pipeline.commands.table import COMMANDS
from pipeline.config.load import field_paths, load
from pipeline.errors import PipelineError
from pipeline.job import spelled_out

ROOT = Path(__file__).parents[1]
DOCS = sorted(path for place in ("", "docs", "cluster") for path in (ROOT / place).glob("*.md"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))
FIELDS = {path for path, _ in field_paths()}
SECTIONS = {path.partition(".")[0] for path in FIELDS}
FLAGS = {"--help", "--help=all", "-h", "--dry-run"}
OPTIONS = {"sync": {"--again"}}
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
ENDINGS = {"yaml", "py", "md", "json", "jsonl", "html", "safetensors", "pt", "parquet", "svg"}
WRITTEN = {"photos.yaml"}  # a recipe that `jobs/start.py photos/` writes
TEXT = {".md", ".py", ".yaml", ".toml", ".txt", ".sh", ""}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; comments and continuations understood."""
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def given_to_main(job: Path, name: str) -> Any:
    """What the command of a job has under a name, e.g. its short names."""
    return getattr(COMMANDS[job.stem], name)


def wrong(words: list[str]) -> str:
    """What is wrong with a command of ours, if anything; others are not judged."""
    if words[0] == "make":
        missing = [w for w in words[1:] if w not in TARGETS and "=" not in w]
        return f"make has no target {missing[0]}" if missing else ""
    scripts = [i for i, word in enumerate(words) if re.fullmatch(r"(.*/)?jobs/\w+\.py", word)]
    if not scripts:
        return ""
    name, rest = words[scripts[0]], words[scripts[0] + 1 :]
    if not (ROOT / name).is_file():
        return f"there is no {name}"
    stem = Path(name).stem
    for flag in [w for w in rest if w.startswith("-")]:
        if flag not in FLAGS | OPTIONS.get(stem, set()):
            return f"{name} has no option {flag}"
    if stem in OPTIONS:  # it takes folders, no fields
        return ""
    given = [w for w in rest if not w.startswith("-") and w not in ("&", "&&", ";")]
    short, taken = (given_to_main(ROOT / name, what) for what in ("shorthand", "words"))
    given = spelled_out(given, short or {}, taken or ())
    given = [w for w in given if w not in WRITTEN]
    recipes = [w for w in given if "=" not in w]
    for recipe in recipes:
        if not (ROOT / recipe).is_file():
            return f"there is no {recipe}"
    try:
        load([str(ROOT / w) if w in recipes else w for w in given if "…" not in w])
    except PipelineError as error:
        return error.what
    return ""


def all_wrong(text: str) -> list[str]:
    found = []
    for language in ("bash", "sh", "shell", "console"):
        for block in blocks(text, language):
            found += [f"{' '.join(w)}: {said}" for w in commands(block) if (said := wrong(w))]
    return found


def unknown_fields(text: str) -> list[str]:
    """`section.field` or `section.field=value` in backticks, where no such field or module is."""
    found = []
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        for word in code.split():
            match = re.fullmatch(r"(\w+)\.(\w+)(=.*)?", word)
            if not match or match[1] not in SECTIONS or match[1] + "." + match[2] in FIELDS:
                continue
            if not match[3] and (ROOT / "pipeline" / match[1] / f"{match[2]}.py").is_file():
                continue
            if match[2] in ENDINGS:  # a file of that name
                continue
            found.append(word)
    return found


def broken_links(path: Path) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        linked = (path.parent / file).resolve() if file else path
        if not linked.exists() or (anchor and anchor not in anchors(linked.read_text())):
            found.append(target)
    return found


def anchors(text: str) -> set[str]:
    """The names of headings as GitHub makes them."""
    heads = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_commands_in_the_documentation_parse() -> None:
    assert not of_all_documents(lambda path: all_wrong(path.read_text()))


def test_fields_in_the_documentation_exist() -> None:
    assert not of_all_documents(lambda path: unknown_fields(path.read_text()))


def test_links_in_the_documentation_lead_somewhere() -> None:
    assert not of_all_documents(broken_links)


def test_names_of_the_api_in_the_documentation_exist() -> None:
    names = set(api.__all__)
    pattern = re.compile(r"`(?:[^`\n]*\W)?api\.(\w+)")
    assert not of_all_documents(
        lambda path: [name for name in pattern.findall(path.read_text()) if name not in names]
    )


def test_files_in_the_documentation_exist() -> None:
    pattern = r"\b((?:pipeline|jobs|configs|tests|docs|benchmarks)/[\w./-]+\.(?:py|yaml|md|json))\b"
    assert not of_all_documents(
        lambda path: [n for n in re.findall(pattern, path.read_text()) if not (ROOT / n).exists()]
    )


def test_a_document_is_a_few_pages_and_listed() -> None:
    """At most 250 lines, and `docs/README.md` says which question it answers."""
    listed = (ROOT / "docs" / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert len(path.read_text().splitlines()) <= 250, named(path)
        assert path.name == "README.md" or f"]({path.name})" in listed, named(path)


def test_each_room_is_on_the_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = [path.parent for path in (ROOT / "pipeline").glob("*/**/__init__.py")]
    assert rooms
    assert not [named(room) for room in rooms if f"| `{named(room)}/` |" not in text]


def of_all_documents(faults: Callable[[Path], list[str]]) -> list[str]:
    return [f"{named(path)}: {fault}" for path in DOCS for fault in faults(path)]


def test_what_help_shows_works() -> None:
    for path in JOBS:
        text = "\n".join(COMMANDS[path.stem].examples)
        shown = re.findall(r"^ *(python jobs/.*?)(?:   .*)?$", text, re.MULTILINE)
        assert shown, path
        assert not [f"{line}: {said}" for line in shown if (said := wrong(shlex.split(line)))]


def test_there_is_a_readme_of_a_page_or_two() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures and all((ROOT / x).stat().st_size < 200_000 for x in pictures)
    assert list(blocks(text, "bash"))
    assert "make demo" in text
    assert "make test" in text


PLANTED = [
    ("python jobs/run.py configs/demo.yaml optim.lrr=1", "optim.lrr: no such field"),
    ("python jobs/run.py configs/demo.yaml optim.steps=ten", "valid integer"),
    ("python jobs/run.py configs/nothing.yaml", "there is no configs/nothing.yaml"),
    ("python jobs/fly.py configs/demo.yaml", "there is no jobs/fly.py"),
    ("python jobs/run.py configs/demo.yaml --fast", "has no option --fast"),
    ("python jobs/run.py \\\n  configs/demo.yaml \\\n  optim.lrr=1", "optim.lrr: no such field"),
    ("ray job submit --address x --working-dir . -- python jobs/run.py a.b=1", "a: no such"),
    ("RAY_ADDRESS=auto python jobs/pack.py data.sauce=x", "data.sauce: no such field"),
    ("make moon", "make has no target moon"),
    ("python jobs/sync.py runs/demo --twice", "has no option --twice"),
]


def test_a_planted_command_is_reported() -> None:
    for block, said in PLANTED:
        faults = all_wrong(f"Text\n\n```bash\n{block}\n```\n")
        assert len(faults) == 1, f"{block}: {faults}"
        assert said in faults[0], f"{block}: {faults}"


def test_what_is_right_is_not_reported() -> None:
    block = "make demo  # a word\nls -l\npython jobs/run.py configs/demo.yaml optim.lr=1e-3 # so\n"
    block += "python jobs/sync.py runs/demo --again\npip install something\n"
    assert not all_wrong(f"```bash\n{block}```\n")
    assert unknown_fields("`data.sauce=x` and `optim.lr`, `track.journal`, `run.yaml`") == [
        "data.sauce=x"
    ]
    assert anchors("# One\n\n## How it's *done*, here\n") == {"one", "how-its-done-here"}


def test_curation_can_be_switched_off_as_the_quickstart_says() -> None:
    assert "`curate.preset=`" in (ROOT / "docs" / "quickstart.md").read_text()
    for recipe in sorted((ROOT / "configs").glob("*.yaml")):
        config = load([str(recipe), "curate.preset="])
        assert not config.curate.preset, recipe
        assert config.quality == type(config.quality)(), recipe
        assert config.dedup == type(config.dedup)(), recipe


def test_the_project_is_installed_from_the_clone() -> None:
    """An index may have a package of that name which is not ours."""
    promise = re.compile(r"install[^\n]*['\" ]raydino\b(?!-constraints)")
    folders = ("pipeline", "jobs", "configs", "cluster", "docs", "benchmarks")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in TEXT]
    texts = {path: path.read_text(errors="replace") for path in [*files, *DOCS] if path.is_file()}
    assert not [named(path) for path, text in texts.items() if promise.search(text)]
    assert promise.search("pip install 'raydino[onnx]'")
