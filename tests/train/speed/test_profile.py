"""Traces of real steps as Perfetto reads them, and a trace with a GPU, written by hand."""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from pipeline.train.speed import parts
from pipeline.train.speed.parts import part
from pipeline.train.speed.profile import Profile
from pipeline.train.speed.shares import OTHER, PARTS, REDUCE, shares_of
from tests.s3 import S3
from tests.train.small_run import Run, views

IN_A_STEP = set(PARTS) - {"data", "colour"}  # what `train_step` does


def train(profile: Profile, first: int, last: int, forward: Any = None) -> None:
    """Steps as the loop runs them; the views come from another thread."""
    run = Run()
    student = forward(run.pair.student) if forward else None
    for number in range(first, last + 1):
        profile.begin(number)
        with part("data"):
            maker = threading.Thread(target=colours)
            maker.start()
            maker.join()
        run.step(views(4), views(4, seed=1), forward=student)
        profile.end()
    profile.close()


def colours() -> None:
    with part("colour"):
        torch.ones(100).sum()


def read(path: Path) -> list[dict[str, Any]]:
    trace = json.loads(gzip.decompress(path.read_bytes()))
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def inside(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    return (
        inner["tid"] == outer["tid"]
        and outer["ts"] <= inner["ts"]
        and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    )


@pytest.mark.long
def test_a_trace_has_the_steps_with_all_their_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pipeline.train"):
        train(Profile((3, 5), 0, tmp_path), 1, 7)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["steps-3-5.json.gz", "steps-3-5.md"]
    marks = [x for x in read(tmp_path / "steps-3-5.json.gz") if x["cat"] == "user_annotation"]
    steps = [x for x in marks if x["name"].startswith("step ")]
    assert [x["name"] for x in steps] == ["step 3", "step 4", "step 5"]
    shares = []
    for one in steps:
        within = [x for x in marks if x["name"] in PARTS and inside(x, one)]
        assert {x["name"] for x in within} == IN_A_STEP | {"data"}
        assert sum(x["name"] == "backward" for x in within) == 2  # one a micro batch
        for x in within:
            if x["name"] == "teacher":  # asked for when a target is
                assert any(y["name"] == "targets" and inside(x, y) for y in within)
        # those that stand side by side do not overlap
        outer = sorted((x for x in within if x["name"] != "teacher"), key=lambda x: x["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(outer))
        shares.append(sum(x["dur"] for x in outer) / one["dur"])
    assert max(shares) > 0.5  # little is left out, in a step that nobody else held up
    aside = [x for x in marks if x["name"] == "colour"]
    assert len(aside) == 3 and all(x["tid"] != steps[0]["tid"] for x in aside)
    said = caplog.text
    assert "steps-3-5.json.gz" in said and "backward" in said and "ms a step" in said
    table = (tmp_path / "steps-3-5.md").read_text()
    assert all(f"| {name} |" in table for name in (*PARTS, OTHER))


def test_the_parts_of_a_real_trace_add_up_to_its_steps(tmp_path: Path) -> None:
    train(Profile((1, 2), 0, tmp_path), 1, 2)  # from the very first step on
    trace = json.loads(gzip.decompress((tmp_path / "steps-1-2.json.gz").read_bytes()))
    shares = shares_of(trace)
    assert shares is not None and shares.steps == 2
    assert set(shares.host_ms) == IN_A_STEP | {"data", OTHER} and not shares.device_ms
    assert sum(shares.host_ms.values()) == pytest.approx(shares.step_ms)
    assert set(shares.beside_ms) == {"colour"}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    profile = Profile((2, 3) if rank == 0 else None, 0, Path(folder, "trace"))
    train(profile, 1, 4, DistributedDataParallel)
    dist.destroy_process_group()


@pytest.mark.long
def test_the_sum_of_gradients_is_seen_in_the_backward_pass(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    path = tmp_path / "trace" / "steps-2-3.json.gz"
    assert any(x["name"] == "gloo:all_reduce" for x in read(path))
    shares = shares_of(json.loads(gzip.decompress(path.read_bytes())))
    assert shares is not None and shares.host_ms[REDUCE] > 0
    assert "| reduce |" in path.with_name("steps-2-3.md").read_text()


def test_nothing_is_marked_where_no_trace_is_taken(tmp_path: Path) -> None:
    profile = Profile((2, 2), 0, tmp_path)
    seen = []
    for number in (1, 2, 3):
        profile.begin(number)
        seen.append(part("loss"))
        profile.end()
    assert seen[0] is seen[2] is part("teacher")
    assert isinstance(seen[1], torch.profiler.record_function)


def test_a_run_that_ends_early_leaves_what_it_has(tmp_path: Path) -> None:
    profile = Profile((2, 9), 0, tmp_path)
    for number in (1, 2, 3, 4):
        profile.begin(number)
        if number < 4:  # the last one is not finite: the loop leaves without its end
            profile.end()
    profile.close()
    names = {x["name"] for x in read(tmp_path / "steps-2-4.json.gz")}
    assert {"step 2", "step 3", "step 4"} <= names
    assert not parts._Recording.on
    profile.close()  # and again: nothing


@pytest.mark.long
def test_a_run_that_goes_on_behind_the_steps_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pipeline.train"):
        train(Profile((2, 3), 3, tmp_path), 4, 4)
        assert "train.profile_steps=[2,3] lies before step 3" in caplog.text
        train(Profile((2, 5), 3, tmp_path), 4, 5)  # what is left of them
    assert (tmp_path / "steps-4-5.json.gz").exists()


def test_a_trace_goes_into_a_bucket(s3: S3, tmp_path: Path) -> None:
    s3.make("traces")
    train(Profile((1, 1), 0, "s3://traces/runs/a/pretrain/profile"), 1, 1)
    names = s3.objects("traces")
    assert {"steps-1-1.json.gz", "steps-1-1.md"} == {name.rpartition("/")[2] for name in names}


@pytest.mark.parametrize("where", ["run folder", "no temporary folder", "cut short"])
def test_what_cannot_be_written_stops_nothing(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "profile"
    if where == "run folder":
        folder.touch()
    elif where == "no temporary folder":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    else:  # as a full disk leaves it

        def cut(_: Any, path: str) -> None:
            Path(path).write_bytes(gzip.compress(b'{"traceEvents": [')[:-9])

        exporting = "pipeline.train.speed.profile._KinetoProfile.export_chrome_trace"
        monkeypatch.setattr(exporting, cut)
    train(Profile((1, 1), 0, folder), 1, 2)
    assert "could not be written" in caplog.text
    assert not folder.is_dir()


def test_a_gpus_time_counts_to_what_launched_it() -> None:
    """By hand: kernels run later than they were launched, and those of a sum beside others."""

    def event(name: str, cat: str, tid: int, ts: float, dur: float, link: int = 0) -> Any:
        args = {"correlation": link} if link else {}
        return {"ph": "X", "name": name, "cat": cat, "tid": tid, "ts": ts, "dur": dur, "args": args}

    note = "user_annotation"
    events = [
        event("step 7", note, 1, 0, 1000),
        event("targets", note, 1, 0, 150),
        event("teacher", note, 1, 50, 50),
        event("backward", note, 1, 200, 100),
        event("finite check", note, 1, 300, 600),  # waits for the device
        event("colour", note, 2, 210, 40),  # the thread that makes views ahead
        event("cudaLaunchKernel", "cuda_runtime", 1, 60, 5, 11),
        event("cudaLaunchKernel", "cuda_runtime", 1, 120, 5, 12),
        event("cudaLaunchKernel", "cuda_runtime", 3, 220, 5, 13),  # autograd's thread
        event("cudaLaunchKernel", "cuda_runtime", 3, 230, 5, 14),
        event("cuLaunchKernelEx", "cuda_driver", 2, 225, 5, 15),
        event("cudaLaunchKernel", "cuda_runtime", 1, 190, 5, 16),  # between two parts
        event("cudaLaunchKernel", "cuda_runtime", 1, 1200, 5, 17),  # after the step
        event("gemm", "kernel", 7, 100, 100, 11),
        event("softmax", "kernel", 7, 200, 50, 12),
        event("gemm", "kernel", 7, 300, 400, 13),
        event("ncclDevKernel_AllReduce_Sum_f32", "kernel", 8, 500, 300, 14),
        event("blur", "kernel", 9, 320, 80, 15),
        event("Memcpy", "gpu_memcpy", 7, 900, 20, 16),
        event("gemm", "kernel", 7, 1300, 500, 17),
        {"ph": "M", "name": "process_name"},
    ]
    shares = shares_of({"traceEvents": events})
    assert shares is not None
    assert shares.step_ms == 1.0
    assert shares.host_ms == pytest.approx(
        {"teacher": 0.05, "targets": 0.1, "backward": 0.1, "finite check": 0.6, OTHER: 0.15}
    )
    assert shares.beside_ms == pytest.approx({"colour": 0.04})
    assert shares.device_ms == pytest.approx(
        {"teacher": 0.1, "targets": 0.05, "backward": 0.7, REDUCE: 0.3, "colour": 0.08, OTHER: 0.02}
    )
    # 100 to 250, 300 to 800, 900 to 920
    assert shares.device_busy_ms == pytest.approx(0.67)
    assert "GPU at work 67 %" in shares.line() and "reduce 30.0 %" in shares.line()


def test_a_trace_without_a_step_has_no_shares() -> None:
    assert shares_of({"traceEvents": []}) is None
