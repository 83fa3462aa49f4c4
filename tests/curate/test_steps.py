"""Steps: what a key is made of, what runs again, and what of other files stays."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.curate.steps import tasks
from pipeline.curate.steps.steps import Output, Resources, Step, Steps, key_of, numbered
from tests.standins import tasks_here

SCHEMA = pa.schema([("row", pa.int64()), ("value", pa.int64())])


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks_here(monkeypatch)


@dataclass(frozen=True)
class Rule:
    """Something that is given."""

    least: float
    names: tuple[str, ...] = ()

    def many(self) -> int:
        """How many there are."""
        return len(self.names)


class Called:
    """An object that can be called."""

    def __call__(self) -> None:
        """Does nothing."""


def squares(out: Output, item: int, rule: Rule, before: Step | None = None) -> dict[str, int]:
    """Rows 10 i to 10 i + 9 by file, and by their last digit to buckets."""
    rows = np.arange(10 * item, 10 * item + 10)
    if before is not None:
        rows = before.rows(10 * item, 10 * item + 10, SCHEMA)["value"].to_numpy()
    table = pa.table([rows, rows * rows], schema=SCHEMA)
    out.table(table)
    out.buckets(table, rows % 3, sub="rows")
    out.table(table, sub="requests")
    return {"even": int((rows % 2 == 0).sum())}


def run(root: Path, items: int = 3, **options: Any) -> Step:
    return Steps(root).run("squares", squares, numbered(items), **({"rule": Rule(1.0)} | options))


def test_a_step_is_read_by_rows_and_by_buckets(tmp_path: Path) -> None:
    step = run(tmp_path)
    assert step.total("rows") == 90 and step.total("even") == 15  # written thrice
    assert step.rows(8, 12, SCHEMA)["value"].to_pylist() == [64, 81, 100, 121]
    seen = [step.bucket(n, SCHEMA, sub="rows")["row"].to_pylist() for n in range(4)]
    assert seen == [[r for r in range(30) if r % 3 == n] for n in range(4)]
    assert Steps(tmp_path).stored("squares").tables == step.tables


def test_it_runs_again_when_anything_that_it_is_given_changes(tmp_path: Path) -> None:
    other = replace(run(tmp_path / "other"), name="other")
    changes: list[dict[str, Any]] = [
        {"rule": Rule(2.0)},
        {"rule": Rule(1.0, ("a",))},
        {"before": other},
        {"items": 2},
        {"version": 2},
    ]
    first = run(tmp_path)
    assert run(tmp_path).reused == 3 and run(tmp_path, resources=Resources(2, 1)).reused == 3
    keys = {first.key}
    for change in changes:
        step = run(tmp_path, **change)
        assert step.reused == 0, change
        keys.add(step.key)
    assert len(keys) == 1 + len(changes)


def test_a_step_of_another_key_leaves_no_table_and_no_foreign_file(tmp_path: Path) -> None:
    run(tmp_path, items=5)
    (tmp_path / "squares" / "notes.txt").write_text("mine")
    (tmp_path / "squares" / "b0000").mkdir(exist_ok=True)
    run(tmp_path, items=2)
    tables = {p.name for p in (tmp_path / "squares").rglob("*.parquet")}
    assert tables == {"00000.parquet", "00001.parquet"}
    assert (tmp_path / "squares" / "notes.txt").read_text() == "mine"


def test_a_start_that_was_killed_while_it_emptied_a_step_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, items=5)
    plain, left = tasks.delete_file, 9

    def killed(fs: Any, path: str) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        plain(fs, path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tasks, "delete_file", killed)
        run(tmp_path, items=2)
    assert len(list((tmp_path / "squares").rglob("*.parquet"))) == 12  # some are gone
    assert run(tmp_path, items=2).reused == 0
    names = {path.name for path in (tmp_path / "squares").rglob("*.parquet")}
    assert names == {"00000.parquet", "00001.parquet"}


def cubes(out: Output, item: int, rule: Rule) -> None:
    """Another function, with a table of the same name."""
    out.table(pa.table([[item], [item**3]], schema=SCHEMA))


def test_another_function_under_one_name_runs_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    other = Steps(tmp_path).run("squares", cubes, numbered(3), rule=Rule(1.0))
    assert other.reused == 0 and other.key != first.key and other.total("rows") == 3


def test_a_task_that_is_missing_is_run_alone(tmp_path: Path) -> None:
    whole = run(tmp_path)
    folder = tmp_path / "squares"
    (folder / "_accounts.json").unlink()
    (folder / "_tasks" / "00001.json").unlink()
    again = run(tmp_path)
    assert again.reused == 2 and again.key == whole.key
    assert again.rows(0, 30, SCHEMA).equals(whole.rows(0, 30, SCHEMA))


def test_what_no_key_can_be_made_of_is_refused(tmp_path: Path) -> None:
    least = 3
    unnamed: list[Any] = [lambda: 3, Rule(1.0).many, Called(), np.array([Rule(1.0)])]

    def closure() -> int:
        return least

    for value in (object(), {1, 2}, Path("x"), closure, max, *unnamed):
        with pytest.raises(TypeError, match="no key can be made"):
            run(tmp_path, rule=value)
    assert key_of(np.arange(3)) != key_of(np.arange(3.0)) != key_of(np.arange(4.0))
    assert key_of(partial(squares, item=1)) != key_of(partial(squares, item=2))


def test_a_task_gets_a_step_without_its_accounts(tmp_path: Path) -> None:
    step = run(tmp_path)
    sent = pickle.loads(pickle.dumps(step))
    assert sent.key == step.key and Step("a", "b", "c").total("even") == 0
    with pytest.raises(RuntimeError, match="total even of the step squares"):
        sent.total("even")
    accounts = tuple({"rows": 1} for _ in range(1000))
    narrow = replace(step, accounts=accounts, tables=tuple(numbered(1000)))
    assert len(pickle.dumps(narrow)) < len(pickle.dumps(replace(narrow, accounts=()))) + 100
    assert not pickle.loads(pickle.dumps(narrow)).bucket(1, SCHEMA).num_rows
    assert sent.bucket(1, SCHEMA, sub="rows").equals(step.bucket(1, SCHEMA, sub="rows"))


def test_steps_of_another_set_carry_its_name_and_one_list_has_all(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    steps.run("squares", squares, numbered(1), rule=Rule(1.0))
    others = steps.below("sets", "a", label="a")
    others.run("squares", squares, numbered(1), rule=Rule(1.0))
    others.run("squares", squares, numbered(1), rule=Rule(1.0))  # a second time says nothing new
    assert [step.name for step in steps.done] == ["squares", "squares/a"]
    aside = steps.aside()
    last = aside.run("more", squares, numbered(2), rule=Rule(1.0))
    aside.run("most", squares, numbered(2), rule=Rule(1.0))
    whole = steps.sum_up("all", last, aside.done)
    assert steps.done[-1] is whole and whole.folder == last.folder
    assert whole.seconds == sum(step.seconds for step in aside.done)
