"""Runs the code of a notebook as Jupyter would, in order and in one process, without Jupyter.

    python -m tests.notebooks docs/first.ipynb

writes what the cells show into the notebook: the value of the last line of a cell as text, and
pictures of Pillow as PNG. What is printed or logged is left out.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def code_cells(notebook: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: Mapping[str, Any], changes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs all cells and fills in their outputs; gives the names that they leave.

    Args:
        notebook: as `json.loads` reads it; its cells are changed.
        changes: text to replace in the code before it runs, e.g. a number of steps.
    """
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), start=1):
        source = "".join(cell["source"])
        for old, new in (changes or {}).items():
            source = source.replace(old, new)
        value = _value(source, f"cell {number}", space)
        cell["execution_count"] = number
        cell["outputs"] = [] if value is None else [_output(value, number)]
    return space


def _value(source: str, name: str, space: dict[str, Any]) -> Any:
    """Of the last line, where that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), space)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), name, "eval"), space)


def _output(value: Any, number: int) -> dict[str, Any]:
    data: dict[str, Any] = {"text/plain": [repr(value)]}
    if isinstance(value, Image.Image):
        stream = io.BytesIO()
        value.quantize(128).save(stream, "PNG", optimize=True)
        text = f"<PIL.Image.Image {value.width}x{value.height}>"
        data = {"image/png": base64.b64encode(stream.getvalue()).decode(), "text/plain": [text]}
    return {
        "output_type": "execute_result",
        "execution_count": number,
        "metadata": {},
        "data": data,
    }


if __name__ == "__main__":
    path = Path(sys.argv[1])
    content = json.loads(path.read_text())
    run(content)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
