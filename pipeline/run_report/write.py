"""Writes `report.html` of a run folder, in the order in which people ask.

What came out; how it learnt; what it takes for alike and what it sees; what went in and what it
cost; how to go on. Everything else is folded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from pipeline.report.page import Heading, Section, write_report
from pipeline.run_report.curves import learning
from pipeline.run_report.details import details
from pipeline.run_report.examples import look_sections, neighbour_sections
from pipeline.run_report.facts import RunFacts
from pipeline.run_report.inputs import cost_sections, curation_sections, data_sections
from pipeline.run_report.result import result_sections
from pipeline.run_report.use import page_links, use_sections
from pipeline.run_report.words import images
from pipeline.storage.run_folder import DONE, RunFolder

FILE = "report.html"
LIMIT_BYTES = 3_000_000


def has_report(folder: RunFolder, stages: Iterable[str]) -> bool:
    """Whether the page is there, and none of these stages has finished since it was written."""
    page = folder.path / FILE
    if not page.is_file():
        return False
    marks = (folder.stage(name) / DONE for name in stages)
    written = page.stat().st_mtime_ns
    return all(one.stat().st_mtime_ns <= written for one in marks if one.is_file())


def write_run_report(facts: RunFacts) -> Path:
    """Writes the page and gives its path."""
    path = facts.path / FILE
    name = facts.config.run.name
    write_report(path, name, list(sections(facts)), subtitle(facts), LIMIT_BYTES)
    return path


def subtitle(facts: RunFacts) -> str:
    """Images, steps and day in a line."""
    parts = []
    if trained := facts.training_images():
        parts.append(f"trained on {images(trained)}")
    if steps := int(facts.result("pretrain").get("step") or 0):
        parts.append(f"{steps:,} steps of {facts.config.optim.global_batch_size:,}")
        if facts.result("evaluate").get("step") == 0:
            parts.append("the weights it started from are kept")
    parts.append(f"{datetime.now(UTC):%-d %B %Y}")
    return " · ".join(parts)


def sections(facts: RunFacts) -> Iterator[Section]:
    """The whole page in its order."""
    yield from result_sections(facts)
    yield from page_links(facts)
    curves = list(learning(facts))
    if curves:
        yield Heading("Learning", "The score is that of the teacher, whose weights are the result.")
        yield from curves
    yield from neighbour_sections(facts)
    yield from look_sections(facts)
    yield from curation_sections(facts)
    yield from data_sections(facts)
    yield from cost_sections(facts)
    yield from use_sections(facts)
    folded = list(details(facts))
    if folded:
        yield Heading("Details", "For those who want to know.")
        yield from folded
