"""Checkpoints: whole or not there, the right ones kept, nothing but tensors loaded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pipeline.errors import DamagedError, TrainError
from pipeline.model.groups import parameter_groups
from pipeline.train.checkpoint import files, reader, restore, state, tensor_file
from pipeline.train.checkpoint.best import Best, write_best
from pipeline.train.checkpoint.names import nested
from pipeline.train.checkpoint.saving import Saving
from pipeline.train.start import TrainState
from pipeline.views.batch import Views
from tests.train.small_run import Run, views

TENSORS = "rank-00000.safetensors"
FILES = ["index.json", "meta.json", TENSORS]
META = {"config": {"run": {"seed": 0}}, "digest": "d"}


def small(value: float = 1.0) -> dict[str, Any]:
    return {"student": {"w": torch.full((3, 2), value)}, "objective": {"n": 1}}


def on_gpu(seen: Views) -> Views:
    tensors = (seen.global_views, seen.local_views, seen.masks)
    return Views(*(x.cuda() for x in tensors), seen.images)


def steps(folder: Path) -> list[int]:
    return [saved.step for saved in state.checkpoints(folder)]


def restored(folder: Path) -> tuple[state.Saved | None, dict[str, Any]]:
    """What a run goes on from."""
    source = restore.newest(folder)
    return (source.saved, nested(source.tensors)) if source else (None, {})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.gpu
def test_on_a_gpu_a_checkpoint_is_of_the_step_that_it_names(tmp_path: Path) -> None:
    """And not of the next one, which changes all weights while a thread writes."""
    run = Run()
    run.pair.to("cuda")
    learnt = parameter_groups(run.pair.student)
    run.optimizer = torch.optim.AdamW(learnt, fused=True)
    train_state = TrainState(run.pair, run.objective, run.optimizer)
    seen = [on_gpu(views(3, seed=seed)) for seed in range(4)]
    run.step(seen[0])
    saving = Saving(tmp_path)
    for step in (1, 2):  # the second one is copied to where the first one was
        expected = {name: x.cpu() for name, x in flatten(train_state.state()).items()}
        saving.begin(step, train_state.state(), META)
        run.step(seen[step])
        ended = saving.ended(wait=True)
        assert ended is not None and not ended.error
        back = flatten(state.latest(tmp_path).load())
        assert back.keys() == expected.keys()
        assert all(torch.equal(x, back[name]) for name, x in expected.items())
    assert all(slab.is_pinned() for slab in saving.host.slabs)
    # and a run on this device that goes on from it takes the same step
    other = Run()
    other.pair.to("cuda")
    other.optimizer = torch.optim.AdamW(parameter_groups(other.pair.student), fused=True)
    source = restore.newest(tmp_path)
    source.into(TrainState(other.pair, other.objective, other.optimizer), torch.device("cuda"))
    again = other.step(seen[2]).scalars["loss/total"]
    run_weights, other_weights = run.weights(), other.weights()
    assert torch.isfinite(again)
    for name, value in run_weights.items():
        torch.testing.assert_close(value, other_weights[name], rtol=1e-5, atol=1e-6)


def test_what_goes_in_comes_out_to_the_bit(tmp_path: Path) -> None:
    run = Run()
    run.step(views(3))
    run.step(views(3, seed=1))
    kept = TrainState(run.pair, run.objective, run.optimizer).state()
    saved = state.save(tmp_path, 2, kept, META)
    newest = state.latest(tmp_path)
    assert newest == saved
    assert newest.step == 2
    assert newest.meta["digest"] == "d"
    loaded = newest.load()
    flat, back = flatten(kept), flatten(loaded)
    assert flat.keys() == back.keys()
    for name, value in flat.items():
        assert value.dtype == back[name].dtype
        assert torch.equal(value, back[name]), name
    # and a run that goes on from it takes the same step to the bit
    other = Run()
    TrainState(other.pair, other.objective, other.optimizer).restore(loaded)
    third = [r.step(views(3, seed=2)).scalars["loss/total"] for r in (run, other)]
    assert torch.equal(*third)
    for name, value in run.weights().items():
        assert torch.equal(value, other.weights()[name]), name


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for n, x in value.items() for k, v in flatten(x, f"{prefix}/{n}").items()}
    return {prefix: value}


def test_the_files_are_what_the_docstring_says(tmp_path: Path) -> None:
    state.save(tmp_path, 1200, small(), META)
    assert names(tmp_path) == ["step-00001200"]
    folder = tmp_path / "step-00001200"
    assert names(folder) == FILES
    meta = json.loads((folder / "meta.json").read_text())
    tensors, index = (folder / TENSORS).read_bytes(), (folder / "index.json").read_bytes()
    header = tensors[: 8 + int.from_bytes(tensors[:8], "little")]
    content = {
        TENSORS: {"bytes": len(tensors), "crc32": zlib.crc32(header)},
        "index.json": {"bytes": len(index), "crc32": zlib.crc32(index)},
    }
    assert meta == META | {
        "step": 1200,
        "version": 5,
        "numbers": {"objective/n": 1},
        "files": content,
        "bytes": len(tensors) + len(index),
        "crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode()),
    }
    assert json.loads(index) == {
        "tensors": {"student/w": {"dtype": "F32", "shape": [3, 2], "parts": [[0, [0, 0], [3, 2]]]}}
    }
    with safe_open(folder / TENSORS, "pt") as file:
        assert torch.equal(file.get_tensor("student/w"), small()["student"]["w"])
        assert file.metadata() == {
            "student/w": f"{zlib.crc32(small()['student']['w'].numpy().tobytes()):08x}"
        }


def half_written(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["tensors", "os.fsync", "index", "rename"])
def test_a_failure_in_the_middle_leaves_the_earlier_one(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.save(tmp_path, 10, small(1), META)
    if where == "tensors":

        def cut(path: Path, tensors: Any) -> None:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tensor_file, "write", cut)
    elif where == "rename":
        monkeypatch.setattr(Path, "rename", half_written)
    elif where == "index":
        monkeypatch.setattr(files, "write_text", half_written)
    else:
        monkeypatch.setattr(os, "fsync", half_written)
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


@pytest.mark.parametrize("call", [1, 2, 3, "rename"])
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
    left = names(tmp_path)
    assert ".step-00000020.tmp" in left
    (tmp_path / ".step-of-others.tmp").mkdir()
    state.save(tmp_path, 15, small(1.5), META)
    state.prune(tmp_path, 3, set())  # as after each save: what the kill left is not kept for good
    assert names(tmp_path) == [".step-of-others.tmp", "step-00000010", "step-00000015"]
    (tmp_path / ".step-of-others.tmp").rmdir()
    killed_in(lambda: state.save(tmp_path, 20, small(2), META), patch)
    # the same step again clears it as well
    state.save(tmp_path, 20, small(3), META)
    assert names(tmp_path) == ["step-00000010", "step-00000015", "step-00000020"]
    newest = state.latest(tmp_path)
    assert newest
    assert newest.load()["student"]["w"][0, 0] == 3


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
    assert names(tmp_path)[0] == ".step-00000010.removed"
    state.prune(tmp_path, 2, set())
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    for path in tmp_path.glob("step-*"):
        assert names(path) == FILES


def cut_tensors(folder: Path) -> None:
    os.truncate(folder / TENSORS, (folder / TENSORS).stat().st_size - 1)


def cut_meta(folder: Path) -> None:
    os.truncate(folder / "meta.json", 10)


def no_tensors(folder: Path) -> None:
    (folder / TENSORS).unlink()


def no_index(folder: Path) -> None:
    (folder / "index.json").unlink()


def no_meta(folder: Path) -> None:
    (folder / "meta.json").unlink()


@pytest.mark.parametrize("damage", [cut_tensors, cut_meta, no_tensors, no_meta, no_index])
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
    """safetensors would take most of them for weights; the file keeps its length."""
    both = {"teacher": {"w": torch.ones(3, 2)}}
    state.save(tmp_path, 10, small(1), META)
    newest = state.save(tmp_path, 20, small(2) | both, META)
    loaded = 0
    for name in (TENSORS, "index.json"):
        file = tmp_path / "step-00000020" / name
        whole = file.read_bytes()
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            file.write_bytes(changed)
            with pytest.raises(DamagedError, match=r"step-00000020 is damaged \("):
                newest.load()
            with contextlib.suppress(Exception), safe_open(file, "pt") as opened:
                loaded += len([opened.get_tensor(key) for key in opened.keys()]) > 0  # noqa: SIM118
        file.write_bytes(whole)
    assert newest.load().keys() == {"student", "objective", "teacher"}
    assert loaded > 0, "this test is about files that safetensors does read"
    file = tmp_path / "step-00000020" / TENSORS
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with caplog.at_level("WARNING", "pipeline.train"):
        saved, tensors = restored(tmp_path)
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

    monkeypatch.setattr(reader, "read_into", lacking)
    with pytest.raises(RuntimeError, match="allocate"):
        restored(tmp_path)


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


@pytest.mark.parametrize("value", [[1, 2], b"bytes", {1}, Path("x"), np.ones(2)])
def test_only_tensors_and_numbers_are_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"student/x is a .*, no tensor and no number"):
        state.save(tmp_path, 1, {"student": {"x": value}}, META)
    assert names(tmp_path) == []


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
        write_best(tmp_path, Best(best, 0.5))
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
    write_best(tmp_path, Best(10, 0.25))
    best = state.best(tmp_path)
    assert best
    assert (best[0].step, best[1].score) == (10, 0.25)
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
    for file in FILES:
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
    "other bytes": lambda m: m | {"bytes": m["bytes"] + 1},
    "no files": lambda m: m.pop("files") and m, "files of no dict": lambda m: m | {"files": [1]},
    "no index": lambda m: m["files"].pop("index.json") and m,
    "another file": lambda m: m["files"].update({"../x": {"bytes": 1, "crc32": 1}}) or m,
    "a file of text": lambda m: m["files"].update({TENSORS: "x"}) or m,
    "a file without bytes": lambda m: m["files"][TENSORS].pop("bytes") and m,
    "another sum of a file": lambda m: m["files"][TENSORS].update({"crc32": 1}) or m,
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
            saved, tensors = restored(folder)
        assert saved and saved.step == 10 and tensors["student"]["w"][0, 0] == 10, name
        assert len(caplog.records) == 1 and len(caplog.text) < 400, name
        assert "step-00000020" in caplog.text and "using an earlier one" in caplog.text, name


def test_files_of_something_else_under_sums_that_fit(tmp_path: Path) -> None:
    """As after a copy of another run's files, with their lengths and checksums written anew."""

    def planted(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        tensor_file.write(folder / TENSORS, {f"student/{k}": x for k, x in tensors.items()})

    plant: dict[str, Callable[[Path], object]] = {
        "empty": lambda folder: (folder / TENSORS).write_bytes(b""),
        "junk": lambda folder: (folder / TENSORS).write_bytes(bytes(range(256)) * 9),
        "long header": lambda folder: (folder / TENSORS).write_bytes(b"\xff" * 8),
        "no tensors": lambda folder: planted(folder, {}),
        "another name": lambda folder: planted(folder, {"v": torch.ones(3, 2)}),
        "another shape": lambda folder: planted(folder, {"w": torch.ones(2, 2)}),
        "index of text": lambda folder: (folder / "index.json").write_text("[]"),
        "index of no parts": lambda folder: (folder / "index.json").write_text(
            '{"tensors": {"student/w": {"dtype": "F32", "shape": [3, 2], "parts": []}}}'
        ),
        "index of another type": lambda folder: (folder / "index.json").write_text(
            '{"tensors": {"student/w": {"dtype": "X", "shape": [3, 2], "parts": []}}}'
        ),
    }
    for name, write in plant.items():
        root = tmp_path / name
        for step in (10, 20):
            state.save(root, step, small(step), META)
        folder = root / "step-00000020"
        write(folder)
        meta = json.loads((folder / "meta.json").read_text())
        for file, said in meta["files"].items():
            content = (folder / file).read_bytes()
            said["bytes"] = len(content)
            if file == TENSORS:
                content = content[: 8 + int.from_bytes(content[:8], "little")]
            said["crc32"] = zlib.crc32(content)
        meta["bytes"] = sum(said["bytes"] for said in meta["files"].values())
        meta["crc32"] = files.checksum_of(meta["files"])
        (folder / "meta.json").write_text(json.dumps(meta))
        saved, tensors = restored(root)
        assert saved and saved.step == 10 and tensors["student"]["w"][0, 0] == 10, name


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
