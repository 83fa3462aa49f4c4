"""The last lines of a whole run: what came of it, where it is, and what to do next."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.context import Context
from pipeline.stages import adapt
from pipeline.storage.run_folder import RunFolder
from pipeline.uri import is_uri, public

log = logging.getLogger("pipeline")
WEIGHTS = ("huggingface", "dinov2", "timm", "module")  # the one that is named: the first there is
PAGES = {"curate": ("curation", "curate/report.html"), "search": ("search", "search/search.html")}


def say_verdict(context: Context, page: str = "") -> None:
    """The verdict of the evaluation, as the last line of a job that evaluates; before it where
    things are and what to do next, and what an adaptation has changed.

    Args:
        context: of the job.
        page: of the run in MLflow; "" where there is none.
    """
    if not context.only:
        for what, text in closing(context, page):
            log.info("%-11s %s", what, text)
    if comparison := adapt.before_and_after(context, context.results):
        for what, text in comparison.lines:
            log.info("%-11s %s", what, text)
        if comparison.warning:
            log.warning("%s", comparison.warning)
    if verdict := context.results.get("evaluate", {}).get("verdict"):
        log.info("%-11s %s", "verdict", verdict)


def closing(context: Context, page: str) -> list[tuple[str, str]]:
    """Lines before the verdict, as (first word, text).

    Args:
        context: of a whole run that is finished.
        page: of the run in MLflow; "" where there is none.
    """
    folder, results = context.folder, context.results
    lines = [("report", short_path(folder, "report.html"))]
    for stage, (word, place) in PAGES.items():
        if stage in results and (folder.path / place).is_file():
            lines.append((word, short_path(folder, place)))
    if form := next((x for x in WEIGHTS if x in _formats(results)), ""):
        lines.append(("weights", short_path(folder, "weights", form)))
    if page:
        lines.append(("mlflow", page))
    lines += [("next" * (not i), text) for i, text in enumerate(_next(context))]
    return lines


def short_path(folder: RunFolder, *names: str) -> str:
    """A place of a run folder, from here where it is below here."""
    place = str(folder.at(*names))
    here = str(Path.cwd())
    if not is_uri(place) and place.startswith(f"{here}/"):
        return place[len(here) + 1 :]
    return public(place)


def _formats(results: Mapping[str, dict[str, Any]]) -> Sequence[str]:
    return list(results.get("export", {}).get("formats", {}))


def _next(context: Context) -> list[str]:
    """What a user would type now."""
    home = short_path(context.folder)
    if "embed" in context.results:
        return [
            typed("search", f"vectors={home}", "query=PHOTO.jpg"),
            typed("serve", f"model={home}", f"vectors={home}/vectors"),
        ]
    source = public(context.config.data.source) or "PHOTOS/"
    return [typed("embed", f"model={home}", f"data.source={source}")]


def typed(job: str, *words: str) -> str:
    """A command as a shell takes it: names with spaces are quoted."""
    return shlex.join(["python", f"jobs/{job}.py", *words])
