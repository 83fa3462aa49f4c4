"""Which checkpoint the workers of a group go on from: the one of rank 0, on all of them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import TrainError
from pipeline.train import worker
from pipeline.train.checkpoint import state


def held(step: int) -> dict[str, Any]:
    return {"student": {"w": torch.full((3,), float(step))}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (55, 61):
        state.save(tmp_path / "checkpoints", step, held(step), {})
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("step", [55, 61, -1])
def test_a_rank_takes_the_checkpoint_of_rank_0_not_the_newest_that_it_sees(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(worker, "_from_rank_0", lambda word: str(step))
    saved, tensors = worker._restored(folder, rank=1)
    if step < 0:
        assert saved is None and not tensors
    else:
        assert saved is not None and saved.step == step
        assert torch.equal(tensors["student"]["w"], held(step)["student"]["w"])


def test_rank_0_tells_what_it_could_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = folder / "step-00000061" / "state.pt"
    newest.write_bytes(b"x" * newest.stat().st_size)  # damaged
    words = []
    monkeypatch.setattr(worker, "_from_rank_0", lambda word: words.append(word) or word)
    saved, _ = worker._restored(folder, rank=0)
    assert saved is not None and saved.step == 55 and words == ["55"]


def test_a_checkpoint_that_is_seen_late_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "SEEN_S", 120.0)
    newest, hidden = folder / "step-00000061", folder / "hidden"
    newest.rename(hidden)

    def show() -> None:
        time.sleep(1)
        hidden.rename(newest)

    threading.Thread(target=show).start()
    assert state.restored_at(folder, 61)[0].step == 61


def test_a_checkpoint_that_a_rank_cannot_read_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "SEEN_S", 0.0)
    with pytest.raises(
        TrainError, match=r"cannot read the checkpoint of step 70 in .*No such file"
    ):
        state.restored_at(folder, 70)
    newest = folder / "step-00000061" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-9])
    with pytest.raises(TrainError, match=r"step 61 in .*: \d+ of \d+ bytes are there"):
        state.restored_at(folder, 61)
