"""The documentation says what there is: commands that parse, fields, files and links that exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from pipeline.config.load import field_paths, load
from pipeline.errors import PipelineError

ROOT = Path(__file__).parents[1]
DOCS = sorted(path for place in ("", "docs", "cluster") for path in (ROOT / place).glob("*.md"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))
FIELDS = {path for path, _ in field_paths()}
SECTIONS = {path.partition(".")[0] for path in FIELDS}
FLAGS = {"--help", "-h", "--dry-run"}
OPTIONS = {"sync": {"--again"}}
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
ENDINGS = {"yaml", "py", "md", "json", "jsonl", "html", "safetensors", "pt", "parquet", "svg"}
TEXT = {".md", ".py", ".yaml", ".yml", ".toml", ".txt", ".cfg", ".css", ".svg", ".json", ""}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; comments and continuations understood."""
    for line in block.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


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


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_commands_in_the_documentation_parse(path: Path) -> None:
    assert not all_wrong(path.read_text())


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_fields_in_the_documentation_exist(path: Path) -> None:
    assert not unknown_fields(path.read_text())


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_links_in_the_documentation_lead_somewhere(path: Path) -> None:
    assert not broken_links(path)


@pytest.mark.parametrize("path", DOCS, ids=named)
def test_files_in_the_documentation_exist(path: Path) -> None:
    pattern = r"\b((?:pipeline|jobs|configs|tests|docs|benchmarks)/[\w./-]+\.(?:py|yaml|md|json))\b"
    missing = [name for name in re.findall(pattern, path.read_text()) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("path", JOBS, ids=named)
def test_what_help_shows_works(path: Path) -> None:
    text = path.read_text().split('"""')[1]
    shown = re.findall(r"^ *(python jobs/.*?)(?:   .*)?$", text, re.MULTILINE)
    assert shown
    assert not [f"{line}: {said}" for line in shown if (said := wrong(shlex.split(line)))]


def test_there_is_a_readme_of_a_page_or_two() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
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


@pytest.mark.parametrize(("block", "said"), PLANTED)
def test_a_planted_command_is_reported(block: str, said: str) -> None:
    (found,) = all_wrong(f"Text\n\n```bash\n{block}\n```\n")
    assert said in found


def test_what_is_right_is_not_reported() -> None:
    block = "make demo  # a word\nls -l\npython jobs/run.py configs/demo.yaml optim.lr=1e-3 # so\n"
    block += "python jobs/sync.py runs/demo --again\npip install something\n"
    assert not all_wrong(f"```bash\n{block}```\n")
    assert unknown_fields("`data.sauce=x` and `optim.lr`, `track.journal`, `run.yaml`") == [
        "data.sauce=x"
    ]
    assert anchors("# One\n\n## How it's *done*, here\n") == {"one", "how-its-done-here"}


# --- nothing of the machine it was written on --------------------------------------------------


def tracked() -> list[Path]:
    """The project's text files: what git knows, or all where there is no git."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        paths: Iterable[Path] = (ROOT / name for name in listed.split("\0") if name)
    else:
        hidden = re.compile(r"/(\.|runs/|__pycache__/|.*\.egg-info/)")
        paths = (p for p in ROOT.rglob("*") if not hidden.search(f"/{p.relative_to(ROOT)}"))
    return sorted(p for p in paths if p.is_file() and p.suffix in TEXT)


# Folders that every machine has, so that naming them gives nothing away
COMMON = re.compile(r"/(tmp|proc|dev|sys|etc|usr|bin|sbin|lib|lib64|var|opt|mnt|run|home|root)?/?$")
SYSTEM = re.compile(r"/(tmp|proc|dev|sys|etc|usr|bin|sbin|lib|lib64|var|opt|run)/")


def of_this_machine(text: str) -> list[str]:
    """Absolute paths in a text that exist here and not on every machine."""
    found = []
    for word in set(re.findall(r"(?<![\w.:/~$}-])(/[\w.-]+(?:/[\w.-]+)*)", text)):
        if COMMON.fullmatch(word) or SYSTEM.match(word) or "/.." in word:
            continue
        if Path(word).exists():
            found.append(word)
    return found


def registry_hosts() -> set[str]:
    """Hosts that pip and uv are told to use here, and the public ones by their usual words."""
    settings = [os.environ.get(name, "") for name in os.environ if re.match("(PIP|UV)_", name)]
    places = [
        Path("/etc/pip.conf"),
        Path.home() / ".config/pip/pip.conf",
        Path.home() / ".pip.conf",
    ]
    places += [Path.home() / ".config/uv/uv.toml", Path("/etc/uv/uv.toml")]
    settings += [place.read_text() for place in places if place.is_file()]
    return {host for text in settings for host in re.findall(r"://(?:[^@/\s]+@)?([\w.-]+)", text)}


REGISTRY = re.compile(
    r"\bpypi\.\w+|pythonhosted|--(?:extra-)?index-url|--find-links|--trusted-host|\bindex-url\s*="
)


@pytest.mark.parametrize("path", tracked(), ids=named)
def test_no_file_names_this_machine_or_a_registry(path: Path) -> None:
    text = path.read_text(errors="replace")
    if path != Path(__file__):
        assert not REGISTRY.findall(text)
    assert not [host for host in registry_hosts() if "." in host and host in text]
    assert not of_this_machine(text)


def test_planted_names_are_reported(tmp_path: Path) -> None:
    here = str(ROOT)
    if not SYSTEM.match(here):
        assert of_this_machine(f"cd {here} && ls") == [here]
        assert of_this_machine(f'"{here}/README.md"') == [f"{here}/README.md"]
    assert of_this_machine("/usr/bin/env python, /tmp/x, /no/such/place, a/b, http://x/usr") == []
    assert REGISTRY.findall("pip install --index-url https://somewhere/simple x")


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=named)
def test_curation_can_be_switched_off_as_the_quickstart_says(recipe: Path) -> None:
    assert "`curate.preset=`" in (ROOT / "docs" / "quickstart.md").read_text()
    config = load([str(recipe), "curate.preset="])
    assert not config.curate.preset
    assert config.quality == type(config.quality)() and config.dedup == type(config.dedup)()


def test_the_project_is_installed_from_the_clone() -> None:
    """An index may have a package of that name which is not ours."""
    promise = re.compile(r"install[^\n]*['\" ]raydino\b(?!-constraints)")
    texts = {path: path.read_text(errors="replace") for path in tracked()}
    del texts[Path(__file__)]
    assert not [named(path) for path, text in texts.items() if promise.search(text)]
    assert promise.search("pip install 'raydino[onnx]'")
