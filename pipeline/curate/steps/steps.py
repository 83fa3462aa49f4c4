"""Steps of a curation: tasks that write tables, keyed by what they are given, so a rerun goes on.

`steps.run("exact/groups", group_bucket, numbered(8), hashes=hashes)` calls
`group_bucket(out, bucket, hashes=hashes)` for each item, and gives back a `Step`, which later steps
read. A step has a key: of its name, its items and all that it is given, of another step the key of
that. So what a step depends on is listed once, as arguments, and none can be forgotten. A step runs
again when its key is another one than that of the tables that are there.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.curate.rows.bucketed import read_bucket, shelves_of, write_buckets
from pipeline.curate.rows.tables import InputFile, read_table, table_writer, write_table
from pipeline.curate.steps.tasks import Account as Account
from pipeline.curate.steps.tasks import Resources as Resources
from pipeline.curate.steps.tasks import Task, finished, run_tasks
from pipeline.storage.run_folder import fingerprint
from pipeline.uri import Place, join

T = TypeVar("T")
ONE_CPU = Resources()
Shelves = dict[str, dict[str, list[int]]]  # by subfolder and name of a table: where its buckets are


@dataclass(frozen=True)
class Step:
    """A finished step: its tables, for later steps, and what it took.

    Attributes:
        name: which may have slashes.
        key: of its settings and inputs.
        folder: where its tables are.
        accounts: what each task returned, in the order of the tasks. `rows` and `bytes` in them are
            added up where they are given.
        reused: tasks that were finished before.
        seconds: wall time of this run.
        cpu_s: CPU time of all tasks, in this run and before.
        peak_bytes: largest resident memory that a task's process had.
        tables: names of the tasks, which most tables are called after.
        sent: this is the copy that a task was sent: of its accounts it has where buckets are.
    """

    name: str
    key: str
    folder: str
    accounts: tuple[Account, ...] = ()
    reused: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    tables: tuple[str, ...] = ()
    sent: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # A task needs to know where buckets are; the accounts of 100,000 tasks are too much for it.
        shelves = tuple({"shelves": a["shelves"]} if "shelves" in a else {} for a in self.accounts)
        return self.__dict__ | {"accounts": shelves if any(shelves) else (), "sent": True}

    def at(self, sub: str = "") -> str:
        """Its folder, or one inside it."""
        return str(join(self.folder, sub)) if sub else self.folder

    def total(self, name: str) -> float:
        """The sum of a number over the accounts, which tasks do not have."""
        if self.sent:
            raise RuntimeError(f"a task asked for the total {name} of the step {self.name}")
        return float(sum(account.get(name, 0) for account in self.accounts))

    def read(
        self, table: str, columns: Sequence[str] | None = None, filters: Any = None, sub: str = ""
    ) -> pa.Table:
        """One of its tables.

        Raises:
            DataError: it is missing or damaged; names the file.
        """
        return read_table(self.at(sub), table, columns, filters)

    def every(
        self,
        schema: pa.Schema,
        filters: Any = None,
        sub: str = "",
        only: Sequence[str] | None = None,
    ) -> pa.Table:
        """The columns of `schema` of all of its tables, or of those in `only`."""
        names = self.tables if only is None else only
        tables = [self.read(name, schema.names, filters, sub).cast(schema) for name in names]
        return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()

    def rows(self, first: int, end: int, schema: pa.Schema, sub: str = "") -> pa.Table:
        """The columns of `schema` of rows `first` to `end` of all of its tables, by row."""
        inside = [("row", ">=", first), ("row", "<", end)]
        return self.every(schema, inside, sub).sort_by("row")

    def buckets(
        self, number: int, columns: Sequence[str] | None = None, sub: str = "", only: str = ""
    ) -> Iterator[pa.Table]:
        """What its tasks, or only one of them, wrote to a bucket: a table for each that wrote."""
        written = [
            table
            for task, account in zip(self.tables, self.accounts, strict=False)  # sent: maybe none
            for table in account.get("shelves", {}).get(sub, {}).items()
            if only in ("", task)
        ]
        return read_bucket(self.at(sub), written, number, columns)

    def bucket(self, number: int, schema: pa.Schema, sub: str = "", only: str = "") -> pa.Table:
        """The columns of `schema` of all that its tasks, or one of them, wrote to a bucket."""
        tables = self.buckets(number, schema.names, sub, only)
        return pa.concat_tables([schema.empty_table(), *(t.cast(schema) for t in tables)])


@dataclass
class Output:
    """Where a task writes and what it may use; it counts what was written.

    Attributes:
        folder: of the step.
        name: of the task; tables are called so where nothing else is said.
        resources: of the task.
        account: what the task returns, with what its function gives.
    """

    folder: str
    name: str = "00000"
    resources: Resources = ONE_CPU
    account: Account = field(default_factory=lambda: {"rows": 0, "bytes": 0})

    @property
    def threads(self) -> int:
        """That the task may use."""
        return max(1, int(self.resources.cpus))

    @property
    def gpu(self) -> bool:
        """Whether it has one."""
        return self.resources.gpus > 0

    def _at(self, sub: str) -> str:
        return str(join(self.folder, sub)) if sub else self.folder

    def table(self, table: pa.Table, name: str = "", sub: str = "") -> None:
        """Writes a table, and counts its rows."""
        self.account["rows"] += len(table)
        self.account["bytes"] += write_table(table, self._at(sub), name or self.name)

    def writer(
        self, schema: pa.Schema
    ) -> AbstractContextManager[tuple[pq.ParquetWriter, Callable[[], int]]]:
        """Of the task's table, piece by piece, as `tables.table_writer`."""
        return table_writer(schema, self.folder, self.name)

    def buckets(
        self, table: pa.Table, bucket: Any, sub: str = "", name: str = "", only: Any = None
    ) -> None:
        """Writes rows, which may be in any order, to the buckets of their numbers.

        Args:
            table: the rows.
            bucket: number of each, int64 [rows].
            sub: folder inside that of the step.
            name: of the files; default: that of the task.
            only: rows that are written, bool [rows]; default: all.
        """
        places = np.arange(len(table)) if only is None else np.flatnonzero(only)
        places = places[np.argsort(bucket[places], kind="stable")]
        numbers, name = bucket[places], name or self.name
        self.account["rows"] += len(places)
        rows = table.take(pa.array(places))  # once, and no table beside it: vectors may be large
        self.account["bytes"] += write_buckets(self._at(sub), name, rows, numbers)
        shelves: Shelves = self.account.setdefault("shelves", {})
        shelves.setdefault(sub, {})[name] = shelves_of(numbers)

    def by_file(self, table: pa.Table, files: Sequence[InputFile]) -> None:
        """Writes each of some consecutive files its part of a table that is ordered by `row`."""
        row = table.column("row").to_numpy()
        for file in files:
            begin, end = np.searchsorted(row, [file.first, file.end])
            self.table(table.slice(begin, end - begin), file.name)


class Steps:
    """The steps below one folder, in the order in which they ran.

    Args:
        root: folder, that all nodes reach; a step's files go to `root/<its name>`.
        label: follows the names of the steps where they are shown: that of another set.
        done: the list that finished steps are added to.
    """

    def __init__(self, root: Place, label: str = "", done: list[Step] | None = None) -> None:
        self.root, self.label = root, label
        self.done: list[Step] = [] if done is None else done

    def below(self, *folders: str, label: str = "") -> Steps:
        """Steps of a folder inside, in the same list."""
        return Steps(join(self.root, *folders), label or self.label, self.done)

    def aside(self) -> Steps:
        """Steps of the same folder in a list of their own; see `sum_up`."""
        return Steps(self.root, self.label)

    def sum_up(self, name: str, last: Step, done: Sequence[Step]) -> Step:
        """Takes many steps into the list as one: the last, with the cost of all."""
        whole = replace(
            last,
            name=name,
            seconds=sum(step.seconds for step in done),
            cpu_s=sum(step.cpu_s for step in done),
            peak_bytes=max((step.peak_bytes for step in done), default=0),
        )
        self.done.append(whole)
        return whole

    def run(
        self,
        name: str,
        function: Callable[..., Any],
        items: Mapping[str, Any],
        resources: Resources = ONE_CPU,
        version: int | tuple[int, ...] = 1,
        **arguments: Any,
    ) -> Step:
        """Runs `function(out, item, **arguments)` for each item that is not finished, as Ray tasks.

        Args:
            name: of the step.
            function: writes with `out`, an `Output`, and may return numbers for the account. It
                must give the same tables whenever it is called.
            items: by the names of their tasks.
            resources: of a task. They are in no key: tables do not depend on them.
            version: of the function, or also of what it calls; another one runs it again.
            arguments: of all tasks alike: numbers, texts, dataclasses of these, and steps.

        Raises:
            PipelineError: what a task said; the others are cancelled.
        """
        begin = time.monotonic()
        folder = str(join(self.root, *name.split("/")))
        key = self.key(name, items, version, function=function, **arguments)
        tasks = [Task(task, (task, item)) for task, item in items.items()]
        called = partial(_call, function=function, arguments=arguments, resources=resources)
        accounts, reused = run_tasks(folder, name, key, tasks, called, resources)
        step = Step(
            f"{name}/{self.label}" if self.label else name,
            key,
            folder,
            tuple(accounts),
            reused,
            time.monotonic() - begin,
            sum(account["_cpu_s"] for account in accounts),
            max((account["_peak_bytes"] for account in accounts), default=0),
            tuple(items),
        )
        if (step.name, step.key) not in [(one.name, one.key) for one in self.done]:
            self.done.append(step)
        return step

    def key(
        self,
        name: str,
        items: Mapping[str, Any],
        version: int | tuple[int, ...] = 1,
        **arguments: Any,
    ) -> str:
        """Of a step: equal keys give equal tables. `function` is among the arguments."""
        return fingerprint([name, version, key_of(items), key_of(arguments)])

    def stored(self, name: str) -> Step:
        """A step of an earlier run as it is on storage; without a key where there is none."""
        folder = str(join(self.root, *name.split("/")))
        key, accounts = finished(folder)
        tables = tuple(sorted(accounts))
        return Step(name, key, folder, tuple(accounts[t] for t in tables), tables=tables)


def key_of(value: Any) -> Any:
    """What changes with a value, JSON-like: of a step and all that has a key this, else itself.

    Raises:
        TypeError: nothing is known of values of this kind. To guess could reuse stale tables.
    """
    if isinstance(key := getattr(value, "key", None), str):
        return key
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(name): key_of(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [key_of(one) for one in value]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        content = blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).hexdigest()
        return [str(value.dtype), list(value.shape), content]
    if isinstance(value, pa.Schema):
        return str(value)
    # Only what its name tells: a lambda, a closure or a method may be another under the same one.
    named = inspect.isfunction(value) and not value.__closure__ and value.__name__ != "<lambda>"
    if named or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if is_dataclass(value):
        return {one.name: key_of(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, partial):
        return [key_of(value.func), key_of(value.args), key_of(value.keywords)]
    raise TypeError(f"a step was given a {type(value).__name__}, of which no key can be made")


def by_number(items: Iterable[T]) -> dict[str, T]:
    """A task for each item, called after its number."""
    return {f"{number:05d}": item for number, item in enumerate(items)}


def numbered(count: int) -> dict[str, int]:
    """So many tasks with their numbers: buckets, shards or parts."""
    return by_number(range(count))


def by_file(out: Output, files: Sequence[InputFile], of: Step, schema: pa.Schema) -> None:
    """Task: from tables by row, one for each task of a step, to one for each input file."""
    out.by_file(of.rows(files[0].first, files[-1].end, schema), files)


def _call(
    folder: str,
    name: str,
    item: Any,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    resources: Resources,
) -> Account:
    """In a worker: one task; what its function returns goes over what was counted."""
    out = Output(folder, name, resources)
    return out.account | (function(out, item, **arguments) or {})
