"""The notebook of the documentation runs, and shows what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.notebooks import code_cells

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "first.ipynb"
# After the last cell, with the names that the cells leave.
ASKED = """
[
    bool(trained.verdict) and trained.report.is_file(),
    features.shape == (len(paths), embedder.dim),
    bool((similarity[:, 0] > 0.5).all()) and rows.shape == (3, 7),
    sheet.getbbox() is not None,
]
"""


def test_its_outputs_are_there_and_small() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < 300_000
    cells = code_cells(json.loads(text))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output["data"] for output in shown) == 2
    assert all(output["output_type"] == "execute_result" for output in shown)
    assert any("Learnt: " in str(output["data"]) for output in shown)


@pytest.mark.jobs
@pytest.mark.timeout(900)
def test_its_cells_run_in_order(tmp_path: Path) -> None:
    """In a process of their own: a call of the chain starts its own Ray."""
    notebook = json.loads(NOTEBOOK.read_text())
    for cell in code_cells(notebook):
        cell["source"] = "".join(cell["source"]).replace('"optim.steps": 100', '"optim.steps": 6')
    notebook["cells"].append({"cell_type": "code", "source": ASKED.strip()})
    copy = tmp_path / "first.ipynb"
    copy.write_text(json.dumps(notebook))
    shown = subprocess.run(
        [sys.executable, "-m", "tests.notebooks", copy],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    cells = code_cells(json.loads(copy.read_text()))
    (answers,) = cells[-1]["outputs"]
    assert answers["data"]["text/plain"] == ["[True, True, True, True]"]
    counted = next(
        output["data"]["text/plain"][0]
        for cell in cells
        for output in cell["outputs"]
        if "duplicate_near" in str(output["data"])
    )
    reasons = {"kept", "flat", "duplicate_near", "leaks_evaluation"}
    assert all(reason in counted for reason in reasons)
