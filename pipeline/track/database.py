"""SQLite databases of MLflow: whether the installed MLflow made them."""

from __future__ import annotations

import os
import re
import sqlite3
from contextlib import closing
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_REVISION = re.compile(r"^(down_)?revision[^=]*= *[\"'](\w+)[\"']", re.MULTILINE)


def mismatch(path: Path) -> str:
    """What is wrong with a database and what to do; empty where nothing is, or it is not there.

    MLflow itself notices after a start of many seconds, in a log.
    """
    try:
        version = _version(path)
    except sqlite3.DatabaseError:
        return f"{path} is no SQLite database: give another file"
    newest, known = _revisions()
    if not version or not newest or version == newest:
        return ""
    if version in known:
        return (
            f"the database {path} is of an older MLflow: make a copy of it, then run "
            f"`mlflow db upgrade sqlite:///{path}`"
        )
    return (
        f"the database {path} is of a newer MLflow than the installed one: install that, or "
        "give another database"
    )


def _version(path: Path) -> str:
    """The migration that a database has seen last; empty where it has none or is busy.

    Raises:
        sqlite3.DatabaseError: it is none.
    """
    if not path.is_file():
        return ""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as opened:
            rows = opened.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError:
        return ""
    return str(rows[0][0]) if rows else ""


@cache
def _revisions() -> tuple[str, frozenset[str]]:
    """The newest migration of the installed MLflow, and all that it knows."""
    spec = find_spec("mlflow")
    if spec is None or not spec.submodule_search_locations:
        return "", frozenset()
    folder = Path(spec.submodule_search_locations[0]) / "store" / "db_migrations" / "versions"
    revisions: set[str] = set()
    parents: set[str] = set()
    for script in folder.glob("*.py"):
        for down, name in _REVISION.findall(script.read_text(encoding="utf-8")):
            (parents if down else revisions).add(name)
    newest = revisions - parents
    return (newest.pop() if len(newest) == 1 else ""), frozenset(revisions)


def artifact_folder(uri: str) -> str | None:
    """Where the files of new experiments in a database go: beside it, not where the job runs."""
    if not uri.startswith("sqlite") or os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT"):
        return None
    return str(path_of(uri).parent / "mlartifacts")


def path_of(uri: str) -> Path:
    """The file of `sqlite:///FILE?…`."""
    return Path(uri.partition(":///")[2].partition("?")[0])
