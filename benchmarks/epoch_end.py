"""Do the ends of passes and of segments stall training? Gaps between batches against the median.

    python benchmarks/epoch_end.py --photos photos/

One worker asks for a batch, works on it for a fixed time, and asks for the next one. Waits are
sorted by what lies between the two batches: nothing, the end of a pass, or the end of a segment
(one Ray Data execution, whose decoders start anew). Segments are made short here, so that there are
some; in a run one is 2,000 read tasks, 32 million images at the usual window.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from loader import packed, spec_of

from pipeline.driver.cluster import quiet_environment
from pipeline.stream.dealer import READ_WINDOWS, DecodeTasks, RunSteps
from pipeline.stream.feeder import launch_feeder
from pipeline.stream.reader import reading_of
from pipeline.stream.worker import StreamRequest, batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=192)
    parser.add_argument("--segment", type=int, default=4, help="read tasks; one is 16 steps here")
    parser.add_argument("--step-s", type=float, default=0.25, help="what the worker takes a batch")
    parser.add_argument("--decoders", type=int, default=1)
    options = parser.parse_args()
    quiet_environment()
    import ray

    folder = Path(tempfile.mkdtemp(prefix="rd", dir="/tmp"))
    ray.init(num_cpus=2, object_store_memory=2**30, include_dashboard=False, logging_level="error",
             log_to_driver=False, _temp_dir=str(folder / "ray"))  # fmt: skip
    try:
        shards = packed(str(Path(options.photos).absolute()), folder)
        reading = reading_of(shards, seed=0, global_batch=options.batch, window=options.batch)
        steps_per_pass = reading.order.steps_per_pass
        spec = spec_of(reading, options.batch)
        tasks = DecodeTasks(0.9, options.decoders)
        feeder = launch_feeder(reading, spec, RunSteps(options.steps, options.segment), tasks, 1)

        @ray.remote(num_cpus=0)
        def train() -> list[float]:
            torch.set_num_threads(1)
            waits, stream = [], batches(
                StreamRequest(feeder, "one", 0, 1, 0, options.steps), options.batch, options.batch
            )  # fmt: skip
            for _ in range(options.steps):
                begin = time.perf_counter()
                next(stream)
                waits.append(time.perf_counter() - begin)
                time.sleep(options.step_s)
            return waits

        waits: list[float] = ray.get(train.remote())
        ray.kill(feeder)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    segment = options.segment * READ_WINDOWS
    kinds: dict[str, list[float]] = {
        "inside a pass": [],
        "end of a pass": [],
        "end of a segment": [],
    }
    for step, wait in enumerate(waits[1:], start=1):
        name = "inside a pass"
        name = "end of a pass" if step % steps_per_pass == 0 else name
        name = "end of a segment" if step % segment == 0 else name
        kinds[name].append(wait)
    print(f"steps of {options.batch} images that take {options.step_s} s; first batch after "
          f"{waits[0]:.1f} s")  # fmt: skip
    print(f"{'wait for the next batch, s':28}{'n':>5}{'median':>9}{'largest':>9}")
    for name, found in kinds.items():
        if found:
            print(f"{name:28}{len(found):5}{statistics.median(found):9.3f}{max(found):9.3f}")


if __name__ == "__main__":
    main()
