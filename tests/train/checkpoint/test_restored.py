"""Which checkpoint the workers of a group go on from: the one of rank 0, on all of them.

Rank 0 and another rank by stand-ins for what they send each other; `test_ranks.py` has real ones.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import TrainError
from pipeline.train.checkpoint import restore, state

TENSORS = "rank-00000.safetensors"


def held(step: int) -> dict[str, Any]:
    return {"student": {"w": torch.full((3,), float(step))}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (55, 61):
        state.save(tmp_path / "checkpoints", step, held(step), {})
    return tmp_path / "checkpoints"


class Told:
    """Another rank: what rank 0 says comes from here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
        self.words = list(words)
        monkeypatch.setattr(restore, "_rank", lambda: 1)
        monkeypatch.setattr(restore, "_ranks", lambda: 2)
        monkeypatch.setattr(restore, "from_rank_0", lambda own: self.words.pop(0))
        monkeypatch.setattr(restore, "_all", lambda own: ["", own])


def of(folder: Path, step: int) -> tuple[str, dict[str, Any]]:
    saved = state.at(folder / f"step-{step:08d}")
    assert saved is not None
    return str(saved.path), saved.meta


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("step", [55, 61, -1])
def test_a_rank_takes_the_checkpoint_of_rank_0_not_the_newest_that_it_sees(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int, split: bool
) -> None:
    Told(monkeypatch, *((0,) if step < 0 else (1, of(folder, step))))
    source = restore.newest(folder, split)
    if step < 0:
        assert source is None
    else:
        assert source is not None and source.step == step
        assert source.bytes_read == 0  # rank 0 sends whole tensors; of slices, its file is none


def test_rank_0_goes_on_from_what_it_could_read(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = folder / "step-00000061" / TENSORS
    newest.write_bytes(b"x" * newest.stat().st_size)  # damaged
    source = restore.newest(folder)
    assert source is not None and source.step == 55
    assert "step-00000061 is damaged" in caplog.text and "using an earlier one" in caplog.text
    first = folder / "step-00000055" / TENSORS
    first.write_bytes(b"x" * first.stat().st_size)
    with pytest.raises(TrainError, match=r"all checkpoints in .* are damaged"):
        restore.newest(folder)


def test_what_one_rank_cannot_take_none_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["it is damaged", ""])
    monkeypatch.setattr(restore, "_all", lambda own: [own, next(answers)])
    source = restore.newest(folder)
    assert source is not None and source.step == 55


def test_a_checkpoint_that_is_seen_late_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "SEEN_S", 120.0)
    Told(monkeypatch, 1, of(folder, 61))
    newest, hidden = folder / "step-00000061", folder / "hidden"
    newest.rename(hidden)

    def show() -> None:
        time.sleep(1)
        hidden.rename(newest)

    threading.Thread(target=show).start()
    source = restore.newest(folder, split=True)
    assert source is not None and source.step == 61


def test_a_checkpoint_that_a_rank_cannot_read_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "SEEN_S", 0.0)
    place, meta = of(folder, 61)
    Told(monkeypatch, 1, (str(folder / "step-00000070"), meta | {"step": 70}))
    with pytest.raises(TrainError, match=r"cannot read the checkpoint .*70, from .*No such file"):
        restore.newest(folder, split=True)
    newest = folder / "step-00000061" / TENSORS
    newest.write_bytes(newest.read_bytes()[:-9])
    Told(monkeypatch, 1, (place, meta))
    with pytest.raises(TrainError, match=r"step-00000061, from .*: \d+ of \d+ bytes of rank"):
        restore.newest(folder, split=True)


class Network:
    """One tensor, of a shape that a checkpoint may not have."""

    def __init__(self, shape: tuple[int, ...], name: str = "student/w") -> None:
        self.tensors = {name: torch.zeros(shape)}

    def live(self, names: Any) -> dict[str, torch.Tensor]:
        return self.tensors

    def take(self, state: dict[str, Any]) -> None: ...


def test_a_network_of_another_shape_is_one_sentence(folder: Path) -> None:
    for network, why in ((Network((4,)), r"has \(3,\) as"), (Network((3,), "teacher/w"), "none")):
        source = restore.newest(folder)
        assert source is not None
        with pytest.raises(TrainError, match=why):
            source.into(network, torch.device("cpu"))
