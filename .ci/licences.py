"""Writes docs/licences.md from the metadata of the packages that are installed.

    python .ci/licences.py            writes it
    python .ci/licences.py --check    says what is missing, and ends with 1

Run it after a change of the dependencies in pyproject.toml, in an environment that has all of them.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections import defaultdict
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"
DEVELOPMENT = "dev"  # an extra that nobody who uses the project installs
NOT_HERE = "not installed where this list was made"
# What metadata says in a roundabout way, or as a whole text
SHORT = {
    "bsd license": "BSD-3-Clause",
    "bsd": "BSD-3-Clause",
    "mit license": "MIT",
    "apache software license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache-2.0 license": "Apache-2.0",
    "apache": "Apache-2.0",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "new bsd": "BSD-3-Clause",
    "python software foundation license": "PSF-2.0",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "isc license (iscl)": "ISC",
    "isc license": "ISC",
    "the unlicense (unlicense)": "Unlicense",
    "historical permission notice and disclaimer (hpnd)": "HPND",
}
HEAD = """# Licences of what is used

raydino is [Apache-2.0](../LICENSE). It brings none of these packages along: the installer fetches
them. `python .ci/licences.py` makes this page from their metadata, which their authors wrote; who
passes packages on should read the licences themselves. `dev` is for work on the project alone.

## Named by pyproject.toml

| package | for | licence |
|---|---|---|
"""
BROUGHT = """
## Brought by these

By licence, on Linux with Python {python}. NVIDIA's packages come with builds of torch for CUDA and
have NVIDIA's own terms; a build of torch for CPUs has none of them.

"""


def name_of(text: str) -> str:
    """A name as registries compare them."""
    return re.sub(r"[-_.]+", "-", text).lower()


def direct() -> dict[str, tuple[Requirement, str]]:
    """The packages that pyproject.toml names, each with what it is for: a run, or an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"every run": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, tuple[Requirement, str]] = {}
    for group, texts in groups.items():
        for text in texts:
            asked = Requirement(text)
            found.setdefault(name_of(asked.name), (asked, group))
    # what an extra names is not for development alone
    for group, texts in groups.items():
        for text in texts:
            name = name_of(Requirement(text).name)
            if found[name][1] == DEVELOPMENT and group != DEVELOPMENT:
                found[name] = (found[name][0], group)
    return found


def licence_of(name: str) -> str:
    """What the metadata of an installed package says."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return NOT_HERE
    if expression := about.get("License-Expression"):
        return str(expression)
    classes = [
        text.rpartition(" :: ")[2]
        for text in about.get_all("Classifier") or []
        if text.startswith("License :: ") and text.count(" :: ") > 1
    ]
    first, *_ = [*str(about.get("License") or "").strip().splitlines(), ""]
    shown = [SHORT.get(text.lower(), text) for text in classes or [first] if text]
    return " or ".join(dict.fromkeys(shown)).replace("UNKNOWN", "") or "not said"


def brought(named: dict[str, tuple[Requirement, str]]) -> set[str]:
    """All packages that those need which users install, without themselves."""
    waiting = [asked for asked, group in named.values() if group != DEVELOPMENT]
    seen: set[tuple[str, frozenset[str]]] = set()
    names = set()
    while waiting:
        asked = waiting.pop()
        key = (name_of(asked.name), frozenset(asked.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            needs = metadata.requires(asked.name) or []
        except metadata.PackageNotFoundError:
            continue
        names.add(key[0])
        for text in needs:
            one = Requirement(text)
            extras = [{"extra": extra} for extra in ("", *asked.extras)]
            if one.marker is None or any(one.marker.evaluate(extra) for extra in extras):
                waiting.append(one)
    return names - set(named)


def page() -> str:
    """The text of docs/licences.md."""
    named = direct()
    rows = [
        f"| {asked.name} | {group} | {licence_of(asked.name)} |"
        for _, (asked, group) in sorted(named.items())
    ]
    by_licence = defaultdict(list)
    for name in sorted(brought(named)):
        by_licence[licence_of(name)].append(name)
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    lists = [f"* {licence}: {', '.join(names)}" for licence, names in sorted(by_licence.items())]
    return HEAD + "\n".join(rows) + "\n" + BROUGHT.format(python=python) + "\n".join(lists) + "\n"


def missing(text: str) -> list[str]:
    """Direct dependencies that a page has no row for."""
    return [
        asked.name for asked, _ in direct().values() if f"\n| {asked.name} | " not in f"\n{text}"
    ]


def main() -> int:
    """Writes the page, or checks it."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page())
        return 0
    lacking = missing(PAGE.read_text() if PAGE.is_file() else "")
    if lacking:
        sys.stderr.write(f"docs/licences.md lacks {', '.join(lacking)}: run .ci/licences.py\n")
    return bool(lacking)


if __name__ == "__main__":
    sys.exit(main())
