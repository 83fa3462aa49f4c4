"""Checkpoints: whole or not there, the right ones kept, nothing but tensors loaded."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import DamagedError, TrainError
from pipeline.train.checkpoint import files, state
from tests.train.small_run import Run, views

META = {"config": {"run": {"seed": 0}}, "digest": "d"}


def small(value: float = 1.0) -> dict[str, Any]:
    return {"student": {"w": torch.full((3, 2), value)}, "objective": {"n": 1}}


def steps(folder: Path) -> list[int]:
    return [saved.step for saved in state.checkpoints(folder)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_goes_in_comes_out_to_the_bit(tmp_path: Path) -> None:
    run = Run()
    run.step(views(3))
    run.step(views(3, seed=1))
    kept = {
        "student": run.pair.student.state_dict(),
        "teacher": run.pair.teacher.state_dict(),
        "objective": run.objective.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    saved = state.save(tmp_path, 2, kept, META)
    newest = state.latest(tmp_path)
    assert newest == saved
    assert newest.step == 2
    assert newest.meta["digest"] == "d"
    loaded = newest.load()
    flat, back = flatten(kept), flatten(loaded)
    assert flat.keys() == back.keys()
    for name, value in flat.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == back[name].dtype
            assert torch.equal(value, back[name]), name
        else:
            assert value == back[name], name
    # and a run that goes on from it takes the same step to the bit
    other = Run()
    other.pair.student.load_state_dict(loaded["student"])
    other.pair.teacher.load_state_dict(loaded["teacher"])
    other.objective.load_state_dict(loaded["objective"])
    other.optimizer.load_state_dict(loaded["optimizer"])
    third = [r.step(views(3, seed=2)).scalars["loss/total"] for r in (run, other)]
    assert torch.equal(*third)
    for name, value in run.weights().items():
        assert torch.equal(value, other.weights()[name]), name


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for n, x in value.items() for k, v in flatten(x, f"{prefix}/{n}").items()}
    if isinstance(value, list | tuple):
        return flatten(dict(enumerate(value)), prefix) or {prefix: len(value)}
    return {prefix: value}


def test_the_files_are_what_the_docstring_says(tmp_path: Path) -> None:
    state.save(tmp_path, 1200, small(), META)
    assert names(tmp_path) == ["step-00001200"]
    folder = tmp_path / "step-00001200"
    assert names(folder) == ["meta.json", "state.pt"]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta == META | {
        "step": 1200,
        "version": state.VERSION,
        "bytes": (folder / "state.pt").stat().st_size,
        "layout": state.layout(small()),
        "crc32": zlib.crc32((folder / "state.pt").read_bytes()),
    }


def half_written(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "json.dump", "rename"])
def test_a_failure_in_the_middle_leaves_the_earlier_one(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.save(tmp_path, 10, small(1), META)
    if where == "torch.save":

        def cut(value: Any, file: Any) -> None:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", cut)
    elif where == "rename":
        monkeypatch.setattr(Path, "rename", half_written)
    else:
        module, name = where.split(".")
        monkeypatch.setattr(getattr(files, module), name, half_written)
    with pytest.raises(OSError, match="No space"):
        state.save(tmp_path, 20, small(2), META)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000010"]
    newest = state.latest(tmp_path)
    assert newest
    assert newest.load()["student"]["w"][0, 0] == 1


def killed_in(act: Callable[[], object], patch: Callable[[], None]) -> None:
    """Does some work in a process of its own, which kills itself where `patch` says."""
    child = os.fork()
    if child == 0:
        try:
            patch()
            act()
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("call", [1, 2, "rename"])
def test_a_kill_in_the_middle_leaves_the_earlier_one(tmp_path: Path, call: int | str) -> None:
    state.save(tmp_path, 10, small(1), META)

    def patch() -> None:
        if call == "rename":
            Path.rename = die  # type: ignore[method-assign,assignment]
            return
        calls: list[int] = []

        def fsync(number: int) -> None:
            calls.append(number)
            if len(calls) == call:
                die()

        os.fsync = fsync  # type: ignore[assignment]

    killed_in(lambda: state.save(tmp_path, 20, small(2), META), patch)
    assert steps(tmp_path) == [10]
    # the same step again clears what the kill left behind
    state.save(tmp_path, 20, small(3), META)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    newest = state.latest(tmp_path)
    assert newest
    assert newest.load()["student"]["w"][0, 0] == 3


def test_a_full_disk_is_an_os_error_however_torch_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="unexpected pos"):
        state.save(tmp_path, 10, small(), META)
    assert names(tmp_path) == []


def test_a_kill_while_pruning_leaves_no_half(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        state.save(tmp_path, step, small(step), META)

    def patch() -> None:
        unlink = Path.unlink

        def first_file_only(path: Path, **_: Any) -> None:
            unlink(path)
            die()

        Path.unlink = first_file_only  # type: ignore[method-assign,assignment]

    killed_in(lambda: state.prune(tmp_path, 2, set()), patch)
    assert steps(tmp_path) == [20, 30]
    for path in tmp_path.glob("step-*"):
        assert names(path) == ["meta.json", "state.pt"]


def cut_tensors(folder: Path) -> None:
    os.truncate(folder / "state.pt", (folder / "state.pt").stat().st_size - 1)


def cut_meta(folder: Path) -> None:
    os.truncate(folder / "meta.json", 10)


def no_tensors(folder: Path) -> None:
    (folder / "state.pt").unlink()


def no_meta(folder: Path) -> None:
    (folder / "meta.json").unlink()


@pytest.mark.parametrize("damage", [cut_tensors, cut_meta, no_tensors, no_meta])
def test_a_damaged_one_is_named_and_passed_over(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    state.save(tmp_path, 10, small(1), META)
    state.save(tmp_path, 20, small(2), META)
    damage(tmp_path / "step-00000020")
    with caplog.at_level("WARNING", "pipeline.train"):
        newest = state.latest(tmp_path)
    assert newest
    assert newest.step == 10
    (record,) = caplog.records
    assert "step-00000020" in record.getMessage()
    assert "using an earlier one" in record.getMessage()


def test_a_byte_that_changed_is_noticed_wherever_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`torch.load` would take most of them for weights; the file keeps its length."""
    state.save(tmp_path, 10, small(1), META)
    newest = state.save(tmp_path, 20, small(2), META)
    file = tmp_path / "step-00000020" / "state.pt"
    whole = file.read_bytes()
    loaded = 0
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        for read in (newest.load, newest.teacher):
            with pytest.raises(DamagedError, match=r"step-00000020 is damaged \(its checksum"):
                read()
        with contextlib.suppress(Exception):
            loaded += len(torch.load(file, weights_only=True)) > 0
    assert loaded > 0, "this test is about files that torch does read"
    with caplog.at_level("WARNING", "pipeline.train"):
        saved, tensors = state.restored(tmp_path)
    assert saved and saved.step == 10
    assert torch.equal(tensors["student"]["w"], small(1)["student"]["w"])
    (said,) = caplog.records
    assert "step-00000020 is damaged" in said.getMessage()


def test_an_error_that_is_not_of_the_file_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.save(tmp_path, 10, small(), META)

    def lacking(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", lacking)
    with pytest.raises(RuntimeError, match="allocate"):
        state.restored(tmp_path)


def test_none_at_all(tmp_path: Path) -> None:
    assert state.latest(tmp_path) is None
    assert state.latest(tmp_path / "not-there") is None
    assert state.best(tmp_path) is None
    state.prune(tmp_path, 2, set())


@pytest.mark.parametrize("version", [0, state.VERSION + 1, None])
def test_another_version_is_refused_with_what_to_do(tmp_path: Path, version: int | None) -> None:
    state.save(tmp_path, 10, small(), META)
    path = tmp_path / "step-00000010" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    with pytest.raises(TrainError) as caught:
        state.latest(tmp_path)
    assert f"has version {version}, expected {state.VERSION}" in caught.value.what
    assert caught.value.hint


class Planted:
    """Unpickled, it would make a file: what must never happen."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    saved = state.save(tmp_path / "checkpoints", 1, {"student": Planted(mark)}, META)
    with pytest.raises(DamagedError, match="step-00000001 is damaged") as refused:
        saved.load()
    assert isinstance(refused.value.__cause__, pickle.UnpicklingError)
    assert not mark.exists()
    torch.load(saved.path / "state.pt", weights_only=False)
    assert mark.exists(), "the trap works"


def test_tensors_come_to_the_cpu_whatever_the_default_device(tmp_path: Path) -> None:
    saved = state.save(tmp_path, 1, small(), META)
    with torch.device("meta"):
        assert saved.load()["student"]["w"].device.type == "cpu"


@pytest.mark.parametrize(
    ("keep_last", "best", "pending", "left"),
    [
        (2, None, set(), [50, 60]),
        (1, None, set(), [60]),
        (2, 20, set(), [20, 50, 60]),
        (2, 60, set(), [50, 60]),
        (1, 20, {30, 40}, [20, 30, 40, 60]),
        (9, None, set(), [10, 20, 30, 40, 50, 60]),
    ],
)
def test_prune_keeps_the_last_the_best_and_the_undecided(
    tmp_path: Path, keep_last: int, best: int | None, pending: set[int], left: list[int]
) -> None:
    for step in range(10, 70, 10):
        state.save(tmp_path, step, small(step), META)
    if best:
        state.mark_best(tmp_path, best, 0.5)
    state.prune(tmp_path, keep_last, pending)
    assert steps(tmp_path) == left


def test_prune_counts_only_whole_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        state.save(tmp_path, step, small(step), META)
    cut_tensors(tmp_path / "step-00000040")
    state.prune(tmp_path, 2, set())
    assert steps(tmp_path) == [20, 30]


def test_the_best_is_found_as_long_as_it_is_there(tmp_path: Path) -> None:
    for step in (10, 20):
        state.save(tmp_path, step, small(step), META)
    state.mark_best(tmp_path, 10, 0.25)
    best = state.best(tmp_path)
    assert best
    assert (best[0].step, best[1]) == (10, 0.25)
    cut_tensors(tmp_path / "step-00000010")
    assert state.best(tmp_path) is None


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    state.save(tmp_path, 10, small(1), META)
    state.save(tmp_path, 10, small(2), META)
    assert names(tmp_path) == ["step-00000010"]
    newest = state.latest(tmp_path)
    assert newest
    assert newest.load()["student"]["w"][0, 0] == 2


OTHERS = (
    "step-old", "step-00000010.bak", "step-00000020 (copy)", "step-20", "step-000000020",
    "step-0000002", "step-1e7", "step--0000010", "Step-00000030", "step-00000030~",
    "step-٠٠٠٠٠٠٣٠", "step-00000099",
)  # fmt: skip


def test_only_names_that_we_write_are_checkpoints(tmp_path: Path) -> None:
    """Copies of a checkpoint under other names, and a file under one of ours."""
    for name in OTHERS:
        folder = tmp_path / name
        for step in (10, 20):
            state.save(folder, step, small(step), META)
        mine = folder / name
        if name == OTHERS[-1]:
            mine.write_text("a file")
        else:
            shutil.copytree(folder / "step-00000020", mine)
        newest = state.latest(folder)
        assert newest and newest.path.name == "step-00000020", name
        assert state.at(mine) is None or state.at(mine) == newest, name
        state.save(folder, 30, small(30), META)
        state.prune(folder, 2, set())
        assert names(folder) == sorted(["step-00000020", "step-00000030", name])


def test_what_others_have_put_beside_a_checkpoint_stays(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        state.save(tmp_path, step, small(step), META)
        (tmp_path / f"step-{step:08d}" / "notes.txt").write_text(f"of {step}")
    state.save(tmp_path, 20, small(21), META)  # the same step again
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-00000005").symlink_to(tmp_path / "elsewhere")
    for file in files.FILES:
        (tmp_path / "elsewhere" / file).write_bytes(
            (tmp_path / "step-00000010" / file).read_bytes()
        )
    meta = json.loads((tmp_path / "elsewhere" / "meta.json").read_text()) | {"step": 5}
    (tmp_path / "elsewhere" / "meta.json").write_text(json.dumps(meta))
    assert steps(tmp_path) == [5, 10, 20, 30]
    state.prune(tmp_path, 1, {20})
    assert steps(tmp_path) == [5, 20, 30]  # what a link leads to is not ours to delete
    assert state.checkpoints(tmp_path)[1].load()["student"]["w"][0, 0] == 21
    for step in (10, 20, 30):
        assert (tmp_path / f"step-{step:08d}" / "notes.txt").read_text() == f"of {step}"
    assert names(tmp_path / "step-00000010") == ["notes.txt"]
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(TrainError, match="at most 99,999,999 steps"):
        state.save(tmp_path, 10**8, small(), META)


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list": lambda m: [m], "null": lambda m: None, "empty": lambda m: "", "cut": lambda m: '{"a"',
    "brackets": lambda m: "[" * 100_000, "no step": lambda m: m.pop("step") and m,
    "no bytes": lambda m: m.pop("bytes") and m, "no crc32": lambda m: m.pop("crc32") and m,
    "text": lambda m: m | {"step": "20"}, "true": lambda m: m | {"step": True},
    "fraction": lambda m: m | {"step": 20.0}, "another step": lambda m: m | {"step": 5},
    "a late step": lambda m: m | {"step": 10**9}, "negative": lambda m: m | {"bytes": -1},
    "null sum": lambda m: m | {"crc32": None}, "another sum": lambda m: m | {"crc32": 1},
    "another layout": lambda m: m | {"layout": "0" * 16},
    "layout of no text": lambda m: m | {"layout": []},
}  # fmt: skip


def test_an_edited_meta_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, edit in EDITS.items():
        folder = tmp_path / name
        for step in (10, 20):
            state.save(folder, step, small(step), META)
        file = folder / "step-00000020" / "meta.json"
        changed = edit(json.loads(file.read_text()))
        file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
        caplog.clear()
        with caplog.at_level("WARNING", "pipeline.train"):
            restored, tensors = state.restored(folder)
        assert restored and restored.step == 10 and tensors["student"]["w"][0, 0] == 10, name
        assert len(caplog.records) == 1 and len(caplog.text) < 400, name
        assert "step-00000020" in caplog.text and "using an earlier one" in caplog.text, name


def test_a_state_of_something_else_under_sums_that_fit(tmp_path: Path) -> None:
    """As after a copy of another run's file, with its length and checksum written anew."""
    plant: dict[str, Callable[[Path], object]] = {
        "empty": lambda file: file.write_bytes(b""),
        "junk": lambda file: file.write_bytes(bytes(range(256)) * 9),
        "start of a zip": lambda file: file.write_bytes(b"PK\3\4" + bytes(range(256))),
        "code": lambda file: torch.save({"teacher": Planted(tmp_path / "mark")}, file),
        "tensor": lambda file: torch.save(torch.ones(3), file),
        "list": lambda file: torch.save([1, 2], file),
        "other keys": lambda file: torch.save({"a": 1}, file),
        "another shape": lambda file: torch.save(
            {"student": {"w": torch.ones(3, 3)}, "objective": {"n": 1}}, file
        ),
        "another type": lambda file: torch.save(
            {"student": {"w": torch.ones(3, 2).half()}, "objective": {"n": 1}}, file
        ),
        "no dict inside": lambda file: torch.save({"student": 5, "objective": {"n": 1}}, file),
    }
    for name, write in plant.items():
        folder = tmp_path / name
        for step in (10, 20):
            state.save(folder, step, small(step), META)
        file = folder / "step-00000020" / "state.pt"
        write(file)
        meta = json.loads((file.parent / "meta.json").read_text())
        meta |= {"bytes": file.stat().st_size, "crc32": zlib.crc32(file.read_bytes())}
        (file.parent / "meta.json").write_text(json.dumps(meta))
        restored, tensors = state.restored(folder)
        assert restored and restored.step == 10 and tensors["student"]["w"][0, 0] == 10, name
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "5", '{"step": "x", "score": 1}', '{"step": 20}',
     '{"step": 20, "score": "nan"}',
     '{"step": 20, "score": NaN}', '{"step": 20.5, "score": 1}', "[" * 100_000, "\x00"],
)  # fmt: skip
def test_a_best_that_names_nothing_is_none(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        state.save(tmp_path, step, small(step), META)
    (tmp_path / "best.json").write_text(text)
    with caplog.at_level("WARNING", "pipeline.train"):
        assert state.best(tmp_path) is None
    assert "best.json names no checkpoint" in caplog.text
    state.prune(tmp_path, 1, set())
    assert steps(tmp_path) == [20]
