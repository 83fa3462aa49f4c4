"""What a fault cost, as a file: the table of `docs/faults.md` is made of these.

`FAULT_FIGURES=folder pytest -m slow tests/cluster` leaves one JSON file for each fault there.
Without the variable nothing is written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def record(
    name: str,
    *,
    lost_steps: int | None = None,
    recovery_s: float | None = None,
    repeated: int | None = None,
    lost: int | None = None,
    metrics_lost: int | None = None,
    note: str = "",
) -> dict[str, Any]:
    """Writes the figures of one fault to `$FAULT_FIGURES/<name>.json`; gives what it wrote.

    Args:
        name: of the fault, the same as the row's in the table: letters, digits and dashes.
        lost_steps: steps whose work was thrown away and done again.
        recovery_s: from the fault to the first step after it, seconds.
        repeated: images that a step was trained on twice in what counts, 0 if all is well.
        lost: images of a pass that no step was trained on, beyond the remainder of the pass.
        metrics_lost: steps whose metrics are missing in the journal or in MLflow.
        note: what the numbers leave open.

    None means that the fault has no such figure, or that the test did not measure it.
    """
    figures = {
        "name": name,
        "lost_steps": lost_steps,
        "recovery_s": None if recovery_s is None else round(recovery_s, 1),
        "repeated": repeated,
        "lost": lost,
        "metrics_lost": metrics_lost,
        "note": note,
    }
    if folder := os.environ.get("FAULT_FIGURES"):
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def table(folder: Path) -> str:
    """The figures of a folder as rows of a Markdown table, by name."""

    def cell(value: Any) -> str:
        return "–" if value is None or value == "" else str(value)

    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    heads = ("name", "lost_steps", "recovery_s", "repeated", "lost", "metrics_lost", "note")
    lines = ["| " + " | ".join(h.replace("_", " ") for h in heads) + " |", "|---" * 7 + "|"]
    lines += ["| " + " | ".join(cell(row[h]) for h in heads) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    print(table(Path(sys.argv[1])))
