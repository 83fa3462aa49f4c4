"""The report of a curation: one page, pictures and numbers for MLflow. Reads tables, needs no Ray.

summary = summarise(root, Facts(steps=steps, calibration=calibration))
write(path, summary)
tracker.metrics(0, metrics(summary))
for key, pixels in pictures(summary).items():
    tracker.picture(f"curate/{key}", 0, pixels)
for name, columns in tables(summary).items():
    tracker.table(name, columns)
tracker.note(note(summary))
"""

from __future__ import annotations

from pathlib import Path

from pipeline.curate.report.numbers import metrics, note, tables
from pipeline.curate.report.pictures import pictures
from pipeline.curate.report.sections import sections
from pipeline.curate.report.summary import Facts, Summary, summarise
from pipeline.report.page import write_report

__all__ = [
    "LIMIT_BYTES",
    "Facts",
    "Summary",
    "metrics",
    "note",
    "pictures",
    "sections",
    "summarise",
    "tables",
    "write",
]

LIMIT_BYTES = 8_000_000


def write(path: Path, summary: Summary, title: str = "Curation", subtitle: str = "") -> None:
    """Writes the report as one HTML file of at most 8 MB that needs nothing else."""
    write_report(path, title, sections(summary), subtitle, limit=LIMIT_BYTES)
