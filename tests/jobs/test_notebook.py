"""The notebook of the documentation runs, and shows what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.notebooks import code_cells, run

NOTEBOOK = Path(__file__).parents[2] / "docs" / "first.ipynb"


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
def test_its_cells_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text())
    names = run(notebook, {'"optim.steps": 100': '"optim.steps": 6'})
    assert names["trained"].verdict and names["trained"].report.is_file()
    assert names["features"].shape == (len(names["paths"]), names["embedder"].dim)
    assert (names["similarity"][:, 0] > 0.5).all() and names["rows"].shape == (3, 7)
    assert isinstance(names["sheet"], Image.Image) and names["sheet"].getbbox()
    reasons = {"kept", "flat", "duplicate_near", "leaks_evaluation"}
    (counted,) = (
        output["data"]["text/plain"][0]
        for cell in code_cells(notebook)
        for output in cell["outputs"]
        if "duplicate_near" in str(output["data"])
    )
    assert all(reason in counted for reason in reasons)
