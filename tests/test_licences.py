"""docs/licences.md has a row for each package that pyproject.toml names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("licences", ROOT / ".ci" / "licences.py")
assert SPEC is not None and SPEC.loader is not None
licences = importlib.util.module_from_spec(SPEC)
sys.modules["licences"] = licences
SPEC.loader.exec_module(licences)


def test_every_direct_dependency_has_its_licence() -> None:
    text = (ROOT / "docs" / "licences.md").read_text()
    assert licences.missing(text) == []
    named = licences.direct()
    assert len(named) > 30 and named["torch"][1] == "every run" and named["onnx"][1] == "onnx"
    rows = dict.fromkeys(line.split(" | ")[2].strip(" |") for line in text.splitlines()
                         if line.startswith("| ") and " | every run | " in line)  # fmt: skip
    assert rows and not {"not said", "", licences.NOT_HERE} & set(rows)


def test_a_package_without_a_row_is_told() -> None:
    text = (ROOT / "docs" / "licences.md").read_text()
    assert licences.missing(text.replace("| torch |", "| flame |")) == ["torch"]
