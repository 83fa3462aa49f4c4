"""The plan of what is read: seconds and memory for sets of a thousand to a hundred thousand shards.

    python benchmarks/reading_plan.py

The sets are made up: shards of 40 row groups of 256 images, so 100,000 shards are a billion rows.
Each size is measured in a process of its own:

    parse       the manifest's JSON to a Python object (the file is in memory)
    open        from that to a ShardSet, sizes checked against the folder's listing
    order       `reading_of`: rows of each row group as one array
    first       the read tasks of the first 16 windows of a pass: one permutation of all row groups
    later       those of 16 windows in the middle of the same pass
    next pass   the first 16 windows of the next pass

Peak memory is what the process added to its imports. `reading` is the plan as it is sent to the
feeder, `task` what a read task is sent for 16 windows. Growth is the exponent between neighbouring
sizes, 1 being linear.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import pickle
import resource
import time
from collections.abc import Callable
from typing import Any

from pyarrow import fs as pafs

from pipeline.shards.columns import SCHEMA_VERSION
from pipeline.shards.manifest import shards_of_manifest
from pipeline.stream.dealer import READ_WINDOWS
from pipeline.stream.reader import reading_of

GROUPS, ROWS = 40, 256
BATCH, WINDOW = 2048, 2048


def manifest(shards: int) -> bytes:
    """As `ledger.write_manifest` writes it."""
    groups = "[" + ", ".join([str(ROWS)] * GROUPS) + "]"
    entries = ", ".join(
        f'{{"name": "part-{i:05d}.parquet", "rows": {GROUPS * ROWS}, "bytes": {2**28 + i}, '
        f'"row_groups": {groups}}}'
        for i in range(shards)
    )
    return (
        f'{{"schema_version": {json.dumps(SCHEMA_VERSION)}, "files": [{entries}], '
        f'"images": {shards * GROUPS * ROWS}, "labelled": 0, "class_names": [], "digest": "00"}}'
    ).encode()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(found: dict[str, float], name: str, call: Callable[[], Any]) -> Any:
    begin = time.perf_counter()
    value = call()
    found[name] = time.perf_counter() - begin
    return value


def measure(shards: int, answer: Any) -> None:
    found: dict[str, float] = {}
    text = manifest(shards)
    infos = [
        pafs.FileInfo(f"/set/part-{i:05d}.parquet", type=pafs.FileType.File, size=2**28 + i)
        for i in range(shards)
    ]
    before = peak_mib()
    content = timed(found, "parse", lambda: json.loads(text))
    opened = timed(found, "open", lambda: shards_of_manifest("/set", "/set", content, infos))
    reading = timed(
        found, "order", lambda: reading_of(opened, seed=0, global_batch=BATCH, window=WINDOW)
    )
    found["reading MiB"] = len(pickle.dumps(reading)) / 2**20
    steps = READ_WINDOWS * WINDOW // BATCH
    middle = reading.order.steps_per_pass // 2
    timed(found, "first", lambda: reading.tasks(0, steps))
    tasks = timed(found, "later", lambda: reading.tasks(middle, middle + steps))
    begin = reading.order.steps_per_pass
    timed(found, "next pass", lambda: reading.tasks(begin, begin + steps))
    found["peak MiB"] = peak_mib() - before
    found["manifest MiB"] = len(text) / 2**20
    found["task KiB"] = len(pickle.dumps(tasks)) / 2**10
    answer.put(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", default="1000,10000,100000")
    sizes = [int(n) for n in parser.parse_args().shards.split(",")]
    context = multiprocessing.get_context("spawn")
    found = []
    for shards in sizes:
        answer = context.Queue()
        process = context.Process(target=measure, args=(shards, answer))
        process.start()
        found.append(answer.get())
        process.join()
    print(f"{'':14}" + "".join(f"{n:>14,}" for n in sizes) + "   growth")
    print(f"{'rows':14}" + "".join(f"{n * GROUPS * ROWS:>14,}" for n in sizes))
    for name in found[0]:
        values = [one[name] for one in found]
        growth = [
            math.log(max(b, 1e-9) / max(a, 1e-9)) / math.log(m / n)
            for (a, n), (b, m) in zip(
                zip(values, sizes, strict=True),
                list(zip(values, sizes, strict=True))[1:],
                strict=False,
            )
        ]
        unit = "" if name.endswith("iB") else ", s"
        print(
            f"{name + unit:14}"
            + "".join(f"{v:14.4f}" for v in values)
            + "   "
            + ", ".join(f"{g:.2f}" for g in growth)
        )


if __name__ == "__main__":
    main()
