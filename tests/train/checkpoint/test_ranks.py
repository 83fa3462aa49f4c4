"""Checkpoints of several ranks: real processes and gloo, whole networks (ddp) and slices (fsdp).

Each way of saving is read by each way of holding, to the bit. What is expected comes from a rule of
the tensor's name, not from a file.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.model.groups import parameter_groups
from pipeline.model.pair import build_pair
from pipeline.train.checkpoint import restore, saving, state, tensor_file
from pipeline.train.checkpoint.names import divided, optimizer_names, prepare_optimizer
from pipeline.train.objective import Objective, ObjectiveSpec
from pipeline.train.parallel.strategy import Layout, prepare, student_forward
from pipeline.train.start import TrainState
from pipeline.train.step import train_step
from tests.train.small_run import HEAD, OTHER_HEAD, SPEC, VALUES, Run, views

pytestmark = pytest.mark.long  # four times new processes, each with a torch of its own
CPU = torch.device("cpu")
STRATEGIES: tuple[Any, ...] = ("ddp", "fsdp")
STEPS = {"plain1": 10, "ddp2": 20, "fsdp2": 30, "fsdp3": 40}


def held(split: bool) -> TrainState:
    """What a rank holds of one small run; slices of it on a mesh of all ranks."""
    run = Run(ibot=OTHER_HEAD)
    if split:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for encoder in run.pair:
            for block in encoder.backbone.blocks:
                fully_shard(block, mesh=mesh)
            for head in (encoder.dino_head, encoder.ibot_head):
                fully_shard(head, mesh=mesh)
            fully_shard(encoder, mesh=mesh)
    optimizer = torch.optim.AdamW(parameter_groups(run.pair.student))
    return TrainState(run.pair, run.objective, optimizer)


def value(name: str, shape: torch.Size) -> torch.Tensor:
    """A value for each name, whoever holds it."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)


def filled(split: bool) -> TrainState:
    """A state in which every number is that of the rule."""
    train_state = held(split)
    prepare_optimizer(train_state.optimizer, set(optimizer_names(train_state.optimizer)))
    for centre in (train_state.objective.dino_centre, train_state.objective.ibot_centre):
        centre.pending = torch.zeros_like(centre.value)
    for name, tensor in divided(train_state.state())[0].items():
        with torch.no_grad():
            whole = value(name, tensor.shape)
            if isinstance(tensor, DTensor):
                whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements).to_local()
                tensor.to_local().copy_(whole)
            else:
                tensor.copy_(whole)
    return train_state


def assert_filled(train_state: TrainState, names: set[str]) -> None:
    tensors = divided(train_state.state())[0]
    assert tensors.keys() == names
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, value(name, whole.shape)), name


def save(folder: Path, step: int, split: bool) -> saving.Written | None:
    writers = saving.writers(split)
    if not split and dist.is_initialized() and dist.get_rank():
        return None
    writing = saving.Saving(folder, writers)
    writing.begin(step, filled(split).state(), {"plan": {}})
    return writing.ended(wait=True)


def assert_read(folder: Path, split: bool) -> None:
    """The only checkpoint in a folder, in a state that begins with other numbers."""
    source = restore.newest(folder, split)
    assert source is not None
    train_state = held(split)
    source.into(train_state, CPU)
    assert_filled(train_state, NAMES())
    assert source.numbers == {}


def NAMES() -> set[str]:
    return set(divided(filled(False).state())[0])


def started(rank: int, ranks: int, root: Path, act: Callable[[int, Path], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root / f'meet-{act.__name__}'}", rank=rank, world_size=ranks
    )
    act(rank, root)
    os._exit(0)  # without a farewell to ranks that may be gone


def in_ranks(ranks: int, root: Path, act: Callable[[int, Path], None]) -> list[int | None]:
    """Runs `act` in so many processes; gives their exit codes."""
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=started, args=(rank, ranks, root, act)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        process.kill()
    return [process.exitcode for process in processes]


def three_save(rank: int, root: Path) -> None:
    assert save(root / "fsdp3", STEPS["fsdp3"], split=True) == saving.Written(STEPS["fsdp3"])


def two(rank: int, root: Path) -> None:
    save(root / "ddp2", STEPS["ddp2"], split=False)
    assert save(root / "fsdp2", STEPS["fsdp2"], split=True) == saving.Written(STEPS["fsdp2"])
    dist.barrier()
    for name in STEPS:
        for split in (False, True):
            assert_read(root / name, split)


def three_read(rank: int, root: Path) -> None:
    for name in STEPS:
        assert_read(root / name, split=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ranks")
    save(folder / "plain1", STEPS["plain1"], split=False)
    assert in_ranks(3, folder, three_save) == [0, 0, 0]
    yield folder


def test_every_way_of_saving_is_read_in_every_way(root: Path) -> None:
    assert in_ranks(2, root, two) == [0, 0]
    assert in_ranks(3, root, three_read) == [0, 0, 0]
    for name in STEPS:
        assert_read(root / name, split=False)


def test_each_tensor_lies_there_once_and_as_others_read_it(root: Path) -> None:
    """Of what all ranks hold one writes; safetensors itself reads each rank's part."""
    folder = root / "fsdp3" / "step-00000040"
    sizes: dict[str, int] = {}
    expected = {name: x.numel() for name, x in divided(filled(False).state())[0].items()}
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["index.json", "meta.json", *(f"rank-0000{i}.safetensors" for i in range(3))]
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, offsets = key.partition("@")
                part = file.get_tensor(key)
                sizes[name] = sizes.get(name, 0) + part.numel()
                whole = value(name, torch.Size([expected[name]]))
                if not offsets:
                    assert torch.equal(part.reshape(-1), whole)
                elif part.numel():  # split along the first axis
                    begin = int(offsets.split(",")[0]) * part[0].numel()
                    assert torch.equal(part.reshape(-1), whole[begin : begin + part.numel()])
    assert sizes == expected


def goes_on(rank: int, root: Path) -> None:
    """Two steps, a checkpoint, and a third step by each strategy, with the run's own code."""
    third: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for strategy in STRATEGIES:
        train_state, forward = begun(Layout(2, CPU, strategy), None)
        for number in range(2):
            one_step(train_state, forward, number, rank)
        writers = saving.writers(strategy == "fsdp")
        if writers or rank == 0:
            writing = saving.Saving(root / strategy, writers)
            writing.begin(2, train_state.state(), {})
            assert writing.ended(wait=True) == saving.Written(2)
        one_step(train_state, forward, 2, rank)
        third[strategy, ""] = whole(train_state)
        for other in STRATEGIES:
            again, its_forward = begun(Layout(2, CPU, other), root / strategy)
            one_step(again, its_forward, 2, rank)
            third[strategy, other] = whole(again)
    for saved_by in STRATEGIES:
        for read_by in STRATEGIES:
            same = saved_by == read_by
            expected, got = third[saved_by, ""], third[saved_by, read_by]
            assert got.keys() == expected.keys()
            for name, x in got.items():
                if same:  # else the same to rounding, as their steps are
                    assert torch.equal(x, expected[name]), (saved_by, read_by, name)
                elif "qkv.bias" not in name:  # the key bias has a gradient of round-off alone
                    torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5)


def begun(layout: Layout, folder: Path | None) -> tuple[TrainState, Any]:
    pair = build_pair(SPEC, HEAD, OTHER_HEAD, seed=0 if folder is None else 1)
    objective = Objective.for_pair(ObjectiveSpec(), pair)
    prepare(pair, layout)
    fused = layout.sharded or None
    train_state = TrainState(
        pair, objective, torch.optim.AdamW(parameter_groups(pair.student), eps=1e-4, fused=fused)
    )
    if folder is not None:
        source = restore.newest(folder, layout.sharded)
        assert source is not None
        source.into(train_state, CPU)
    return train_state, student_forward(pair, layout)


def one_step(train_state: TrainState, forward: Any, number: int, rank: int) -> None:
    images = [views(3, seed=10 * number + rank)]
    train_step(
        forward, train_state.pair, images, train_state.optimizer, VALUES, train_state.objective
    )


def whole(train_state: TrainState) -> dict[str, torch.Tensor]:
    tensors = divided(train_state.state())[0]
    return {
        name: x.full_tensor() if isinstance(x, DTensor) else x.clone()
        for name, x in tensors.items()
    }


def test_steps_after_a_restart_are_those_of_a_run_that_was_left_alone(tmp_path: Path) -> None:
    assert in_ranks(2, tmp_path, goes_on) == [0, 0]


def fails(rank: int, root: Path) -> None:
    folder = root / "fails"
    assert save(folder, 1, split=True) == saving.Written(1)
    group = saving.writers(True)
    writing = saving.Saving(folder, group)
    write, full = tensor_file.write, True

    def guarded(path: Path, tensors: Any) -> int:
        if full and rank == 1:
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    tensor_file.write = guarded  # type: ignore[assignment]
    writing.begin(2, filled(True).state(), {"plan": {}})
    ended = writing.ended(wait=True)
    assert ended is not None and ended.step == 2 and "No space left" in ended.error
    assert writing.failed
    dist.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001"]
    full = False
    writing.again()
    assert writing.ended(wait=True) == saving.Written(2)
    # of two that are whole, the newer has a changed byte in the part of one rank
    if rank == 0:
        file = folder / "step-00000002" / "rank-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 4
        file.write_bytes(content)
    dist.barrier()
    for split in (False, True):
        source = restore.newest(folder, split)
        assert source is not None and source.step == 1
    # and a rank that dies while it writes takes the checkpoint with it
    if rank == 1:
        tensor_file.write = lambda *_: os._exit(9)  # type: ignore[assignment]
    writing.begin(3, filled(True).state(), {"plan": {}})
    ended = writing.ended(wait=True)
    assert ended is not None and "another worker was lost" in ended.error
    assert [saved.step for saved in state.checkpoints(folder)] == [1, 2]


def test_a_rank_that_cannot_write_and_one_that_dies(tmp_path: Path) -> None:
    assert in_ranks(2, tmp_path, fails) == [0, 9]
