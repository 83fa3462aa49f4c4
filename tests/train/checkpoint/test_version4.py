"""Checkpoints of version 4 go on as they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import DamagedError
from pipeline.train.checkpoint import restore, state
from pipeline.train.start import TrainState
from tests.train.checkpoint.version4 import version4_saved
from tests.train.small_run import Run, views

CPU = torch.device("cpu")


def trained(steps: int) -> Run:
    run = Run()
    for step in range(steps):
        run.step(views(3, seed=step))
    return run


def as_version_4(run: Run) -> dict[str, object]:
    return {
        "student": run.pair.student.state_dict(),
        "teacher": run.pair.teacher.state_dict(),
        "objective": run.objective.state_dict(),
        "optimizer": run.optimizer.state_dict(),  # states by number
    }


def test_a_run_goes_on_from_it_to_the_bit(tmp_path: Path) -> None:
    run, other = trained(2), Run()
    version4_saved(tmp_path, 2, as_version_4(run))
    source = restore.newest(tmp_path)
    assert source is not None and source.saved.earlier
    source.into(TrainState(other.pair, other.objective, other.optimizer), CPU)
    third = [r.step(views(3, seed=2)).scalars["loss/total"] for r in (run, other)]
    assert torch.equal(*third)
    for mine, its in zip(run.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[key], its[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    for name, value in run.weights().items():
        assert torch.equal(value, other.weights()[name]), name


def test_it_is_named_as_version_5_is(tmp_path: Path) -> None:
    run = trained(1)
    old = version4_saved(tmp_path / "old", 1, as_version_4(run))
    new = state.save(
        tmp_path / "new", 1, TrainState(run.pair, run.objective, run.optimizer).state(), {}
    )
    before, after = old.load(), new.load()
    assert before["optimizer"].keys() == after["optimizer"].keys()
    for part in ("student", "teacher"):
        assert all(torch.equal(x, after[part][name]) for name, x in before[part].items())
    for saved in (old, new):
        teacher = saved.teacher()
        assert teacher.keys() == run.pair.teacher.state_dict().keys()
        assert all(torch.equal(x, before["teacher"][name]) for name, x in teacher.items())
    assert state.identity(old) != state.identity(new)


def test_both_versions_in_one_folder(tmp_path: Path) -> None:
    """A run that was begun before goes on in the new form; old ones go as new ones come."""
    for step in (1, 2):
        version4_saved(tmp_path, step, {"teacher": {"w": torch.full((2,), float(step))}})
    state.save(tmp_path, 3, {"teacher": {"w": torch.full((2,), 3.0)}}, {})
    assert [saved.teacher()["w"][0] for saved in state.checkpoints(tmp_path)] == [1, 2, 3]
    state.prune(tmp_path, 2, set())
    assert [saved.step for saved in state.checkpoints(tmp_path)] == [2, 3]
    assert not (tmp_path / "step-00000001").exists()


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    saved = version4_saved(tmp_path, 1, {"teacher": {"w": torch.ones(4)}})
    file = tmp_path / "step-00000001" / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for read in (saved.load, saved.teacher):
        with pytest.raises(DamagedError, match=r"is damaged \(its checksum"):
            read()
