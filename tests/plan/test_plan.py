"""What follows from a recipe: against the published runs' numbers and arithmetic done here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.config import Config
from pipeline.config.load import field_paths, load
from pipeline.errors import ConfigError, PlacementError, TrainError
from pipeline.plan.layout import READ_CPUS, Machine
from pipeline.plan.plan import Plan, SetFacts, resolve, view_bytes
from pipeline.plan.portions import CHUNK_BYTES, ENCODED_BYTES, WINDOW_BYTES
from pipeline.plan.resume import MAY_CHANGE, changes, plan_of, value_at
from pipeline.stream import dealer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schedules.json").read_text())
IMAGENET = 1_281_167
LAPTOP = Machine(cpus=4, gpus=0, bfloat16=False)
# What the published recipes say, as our fields say it (their epoch is 1250 steps).
PUBLISHED = {
    "vitl16_short_32gpu": ["optim.lr=4e-3", "optim.warmup=0.1", "optim.freeze_last_layer=0.01"],
    "vitl14_96gpu": [
        "optim.lr=2e-4",
        "optim.warmup=0.16",
        "optim.freeze_last_layer=0.002",
        "optim.weight_decay_end=0.2",
        "teacher.momentum=0.994",
        "teacher.temperature_warmup=0.06",
    ],
}
PUBLISHED["vitg14_256gpu"] = PUBLISHED["vitl14_96gpu"]


def plan(*overrides: str, images: int = 1000, machine: Machine = LAPTOP) -> Plan:
    arguments = ["optim.steps=10", "optim.global_batch_size=64", *overrides]
    if any(o.startswith("optim.passes") for o in overrides):
        arguments[0] = "optim.steps=null"
    return resolve(load(arguments), SetFacts(images, "d"), machine=machine)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_schedules(name: str) -> None:
    golden = GOLDEN[name]
    gpus, share = golden["world_size"], golden["batch_size_per_gpu"]
    result = plan(
        f"optim.steps={golden['total_iters']}",
        f"optim.global_batch_size={gpus * share}",
        *PUBLISHED[name],
        images=IMAGENET,
        machine=Machine(cpus=8 * gpus, gpus=gpus, bfloat16=True),
    )
    assert (result.workers, result.micro_batch, result.worker_batch) == (gpus, share, share)
    assert result.lr == pytest.approx(golden["lr"], rel=1e-12)
    assert result.warmup_steps == golden["warmup_iters"]
    assert result.temperature_warmup_steps == golden["teacher_temp_warmup_iters"]
    for i, step in enumerate(golden["its"]):
        at = result.at(step)
        mine = {
            "lr": at.lr,
            "wd": at.weight_decay,
            "momentum": at.teacher_momentum,
            "teacher_temp": at.teacher_temperature,
            "last_layer_lr": at.last_layer_lr,
        }
        for key, value in mine.items():
            assert value == pytest.approx(golden["values"][key][i], rel=1e-12, abs=1e-15), key


def test_a_short_run_step_by_step() -> None:
    golden, cfg = GOLDEN["tiny_full"], GOLDEN["tiny_full"]["cfg"]
    epochs = cfg["epochs"]
    result = plan(
        f"optim.passes={epochs}",
        "optim.global_batch_size=10",
        f"optim.lr={cfg['lr']}",
        "optim.lr_scaling=none",
        f"optim.warmup={cfg['warmup_epochs'] / epochs}",
        f"optim.freeze_last_layer={cfg['freeze_last_layer_epochs'] / epochs}",
        f"teacher.temperature_warmup={cfg['warmup_teacher_temp_epochs'] / epochs}",
        images=10 * cfg["epoch_length"],
    )
    assert result.steps == epochs * cfg["epoch_length"]
    for step in range(result.steps):
        at = result.at(step)
        assert at.lr == pytest.approx(golden["values"]["lr"][step], rel=1e-12)
        assert at.last_layer_lr == pytest.approx(golden["values"]["last_layer_lr"][step], rel=1e-12)
        temperature = golden["values"]["teacher_temp"][step]
        assert at.teacher_temperature == pytest.approx(temperature, rel=1e-12)


@pytest.mark.parametrize(
    ("passes", "images", "batch", "steps", "a_pass", "left_out"),
    [
        (1, 1000, 64, 15, 15, 40),
        (2, 1000, 64, 30, 15, 40),
        (0.5, 1000, 64, 8, 15, 40),
        (1, 64, 64, 1, 1, 0),
        (1, 127, 64, 1, 1, 63),
        (100, IMAGENET, 2048, 62500, 625, IMAGENET - 625 * 2048),
    ],
)
def test_passes_become_steps(
    passes: float, images: int, batch: int, steps: int, a_pass: int, left_out: int
) -> None:
    result = plan(
        f"optim.passes={passes}",
        f"optim.global_batch_size={batch}",
        "train.workers=1",
        images=images,
    )
    numbers = (result.steps, result.steps_per_pass, result.dropped_per_pass)
    assert numbers == (steps, a_pass, left_out)


@pytest.mark.parametrize(("batch", "factor"), [(1024, 1.0), (256, 0.5), (4096, 2.0), (64, 0.25)])
def test_the_lr_grows_with_the_root_of_the_batch(batch: int, factor: float) -> None:
    size = f"optim.global_batch_size={batch}"
    assert plan(size, images=5000).lr == pytest.approx(2e-3 * factor)
    assert plan(size, "optim.lr_scaling=none", images=5000).lr == 2e-3


@pytest.mark.parametrize(
    ("cpus", "gpus", "batch", "accumulation", "workers"),
    [
        (1, 0, 64, 1, 1),
        (2, 0, 64, 1, 1),
        (4, 0, 64, 1, 2),
        (64, 0, 64, 1, 8),  # at most eight without GPUs
        (12, 0, 64, 1, 4),  # six do not divide 64, nor do five
        (96, 8, 64, 1, 8),
        (96, 8, 60, 1, 6),
        (96, 8, 64, 16, 4),
        (96, 8, 61, 1, 1),
    ],
)
def test_auto_takes_as_many_workers_as_divide_the_batch(
    cpus: int, gpus: int, batch: int, accumulation: int, workers: int
) -> None:
    result = plan(
        f"optim.global_batch_size={batch}",
        f"train.accumulation={accumulation}",
        machine=Machine(cpus=cpus, gpus=gpus, bfloat16=False),
    )
    assert result.workers == workers
    assert result.workers * result.micro_batch * accumulation == batch
    assert result.worker_batch == result.micro_batch * accumulation
    assert result.device == ("cuda" if gpus else "cpu")


GPUS = Machine(cpus=16, gpus=4, bfloat16=False)


def test_the_device_is_the_gpus_unless_said_otherwise() -> None:
    result = plan(machine=GPUS)
    assert (result.device, result.workers, result.precision) == ("cuda", 4, "bfloat16")
    result = plan("train.device=cpu", machine=GPUS)
    assert (result.device, result.workers, result.precision) == ("cpu", 8, "float32")
    assert (result.cpus_per_worker, result.threads) == (0.25, 2)
    with pytest.raises(
        ConfigError, match=r"2 workers of 1 GPU .* has 0 GPUs and 4 CPUs on 1 node: room for none"
    ):
        plan("train.device=cuda", "train.workers=2")
    with pytest.raises(
        ConfigError, match="8 workers of 1 GPU and 1 CPU each need 8 GPUs and 8 CPUs; the"
    ):
        plan("train.workers=8", machine=GPUS)


def test_all_that_cannot_work_is_said_at_once() -> None:
    config = load(["optim.global_batch_size=50", "train.workers=3", "train.accumulation=4"])
    with pytest.raises(ConfigError) as caught:
        resolve(config, SetFacts(10, "d"), machine=LAPTOP)
    lines = caught.value.what.splitlines()
    assert lines == [
        "optim.global_batch_size=50 does not divide into train.workers=3 x train.accumulation=4",
        "optim.global_batch_size=50 is more than the 10 images of the set; a pass needs at least "
        "one step",
        "optim.passes or optim.steps must say how long the run is",
    ]
    assert caught.value.hint


def test_fewer_images_than_workers_times_accumulation() -> None:
    with pytest.raises(ConfigError, match="does not divide into"):
        plan("optim.global_batch_size=2", "train.workers=2", "train.accumulation=2")


sizes = st.integers(1, 300)


@settings(max_examples=200, deadline=None)
@given(
    share=sizes,
    workers=st.integers(1, 6),
    accumulation=st.integers(1, 3),
    rows=st.integers(1, 3000),
    local_crops=st.integers(0, 8),
    side=st.sampled_from([14, 98, 224, 518]),
)
def test_chunks_and_windows_fit(
    share: int, workers: int, accumulation: int, rows: int, local_crops: int, side: int
) -> None:
    batch = share * workers * accumulation
    values = {
        "optim": {"steps": 1, "global_batch_size": batch},
        "augment": {"global_size": side, "local_crops": local_crops},
        "data": {"shuffle_images": rows},
        "train": {"workers": workers, "accumulation": accumulation},
    }

    def resolved(**train: int) -> Plan:
        config = Config.model_validate(values | {"train": train})
        machine = Machine(cpus=2000, gpus=0, bfloat16=False)
        return resolve(config, SetFacts(batch, "d"), machine=machine)

    result = resolved(workers=workers, accumulation=accumulation)
    # a micro batch and a window are whole numbers of chunks, and a chunk is small or one image
    assert result.micro_batch == share
    assert share % result.chunk_images == 0
    assert result.window_images % result.chunk_images == 0
    assert result.chunk_images * result.view_bytes <= CHUNK_BYTES or result.chunk_images == 1
    # a step is a whole number of windows or the other way round, near what was asked for
    assert batch % result.window_images == 0 or result.window_images % batch == 0
    assert result.window_images <= max(rows, 1)
    # and the order of rows stays what it is when the same batch is laid out otherwise
    for other in ({"workers": 1}, {"workers": workers}, {"workers": share * workers}):
        assert resolved(**other).window_images == result.window_images


@given(image_bytes=st.floats(1e3, 5e8), batch=st.integers(1, 5000), rows=st.integers(1, 100_000))
@settings(max_examples=200, deadline=None)
def test_a_window_of_large_images_stays_small(image_bytes: float, batch: int, rows: int) -> None:
    values = {
        "optim": {"steps": 1, "global_batch_size": batch},
        "data": {"shuffle_images": rows},
        "train": {"workers": 1},
    }
    result = resolve(
        Config.model_validate(values),
        SetFacts(batch, "d", image_bytes=image_bytes),
        machine=Machine(cpus=4, gpus=0, bfloat16=False),
    )
    # an image is read whole, however large it is
    assert result.window_images * image_bytes <= WINDOW_BYTES or result.window_images == 1
    assert result.window_images <= rows


def test_the_bytes_of_an_image_are_those_of_its_crops() -> None:
    import numpy as np

    from pipeline.views.crops import CropSpec, cut_crops

    spec = CropSpec(28, 14, 3, (0.3, 1.0), (0.1, 0.3))
    image = np.zeros((40, 40, 3), np.uint8)
    boxes = np.tile(np.array([0, 0, 20, 20]), (5, 1))
    crops = cut_crops(image, boxes, np.zeros(5, bool), spec)
    config = load(["augment.global_size=28", "augment.local_size=14", "augment.local_crops=3"])
    assert view_bytes(config, 3) == sum(part.nbytes for part in crops)


def test_cadence_and_threads() -> None:
    result = plan("optim.steps=1000")
    assert (result.eval_every, result.save_every) == (100, 50)
    assert plan("optim.steps=3").eval_every == 1
    named = plan("train.eval_every=7", "train.save_every=9", "resources.threads=3")
    assert (named.eval_every, named.save_every, named.threads) == (7, 9, 3)
    assert plan("train.workers=2").threads == 2  # four CPUs over two workers
    assert plan("train.workers=1").threads == 4
    assert plan().cpus_per_worker == 0.25
    assert plan("resources.cpus_per_worker=1.5").cpus_per_worker == 1.5


def test_workers_leave_cpus_for_decoding() -> None:
    result = plan("train.workers=2")
    assert (result.decode_cpus, result.decode_tasks) == (0.95, 3)  # of 3.5 CPUs; reading needs some
    small = plan(machine=Machine(cpus=1, gpus=0, bfloat16=False))
    assert small.decode_tasks == 1 and small.decode_cpus == pytest.approx(0.75 - READ_CPUS)
    assert plan("resources.decode_tasks=7").decode_tasks == 7
    # the read tasks' share is theirs on any machine: without it nothing would ever be decoded
    assert dealer.READ_CPUS == READ_CPUS
    for cpus in range(1, 257):
        for gpus in (0, 1, 2, 8):
            if cpus <= gpus:
                continue
            result = plan(machine=Machine(cpus=cpus, gpus=gpus, bfloat16=True))
            used = (
                result.workers * result.cpus_per_worker + result.decode_tasks * result.decode_cpus
            )
            assert used + READ_CPUS <= cpus + 1e-9, (cpus, gpus)
    with pytest.raises(ConfigError, match="leave none of the 4 CPUs for decoding"):
        plan("train.workers=2", "resources.cpus_per_worker=2")


@pytest.mark.parametrize(
    ("asked", "bfloat16", "gpus", "precision", "reason"),
    [
        ("auto", False, 1, "bfloat16", "the cuda has it"),
        ("auto", True, 0, "bfloat16", "the cpu has it"),
        ("auto", False, 0, "float32", "no fast bfloat16 on this cpu"),
        ("float32", True, 1, "float32", "asked for"),
        ("bfloat16", False, 0, "bfloat16", "asked for"),
    ],
)
def test_precision(asked: str, bfloat16: bool, gpus: int, precision: str, reason: str) -> None:
    machine = Machine(cpus=4, gpus=gpus, bfloat16=bfloat16)
    result = plan(f"train.precision={asked}", machine=machine)
    assert (result.precision, result.precision_reason) == (precision, reason)


def test_compile_is_for_gpus_unless_asked_for() -> None:
    gpu = Machine(cpus=4, gpus=1, bfloat16=True)
    assert [plan().compile, plan(machine=gpu).compile] == [False, True]
    assert plan("train.compile=true").compile
    assert not plan("train.compile=false", machine=gpu).compile


def test_a_plan_survives_its_way_to_the_workers() -> None:
    result = plan("optim.lr=1.2345e-3", "model.width=48", "model.heads=3")
    assert Plan.model_validate_json(result.model_dump_json()) == result


def other_value(path: str, old: Any) -> Any:
    """A valid value that is not the field's."""
    special: dict[str, Any] = {
        "augment.global_size": 238,
        "augment.local_size": 112,
        "augment.global_scale": (0.5, 1.0),
        "augment.local_scale": (0.1, 0.3),
        "augment.blur": "released",
        "model.size": "vitb",
        "model.width": 192,
        "model.heads": 3,
        "model.patch_size": 7,
        "model.ffn": "swiglu",
        "loss.centring": "sinkhorn",
        "loss.mask_ratio": (0.2, 0.4),
        "optim.lr_scaling": "none",
        "optim.steps": 11,
        "optim.betas": (0.8, 0.9),
        "data.label_column": "none",
        "train.workers": 1,
        "train.device": "cpu",
        "train.precision": "float32",
        "train.compile": True,
        "evaluate.image_size": 112,
        "export.checkpoint": "last",
        "curate.preset": "dedup",
        "balance.levels": (300,),
    }
    if path in special:
        return special[path]
    match old:
        case bool():
            return not old
        case str():
            return f"{old}x"
        case None:
            return 5
        case int():
            return old + 1
        case float():
            return old / 2 if old else 0.5
        case tuple():
            texts = not old or isinstance(old[0], str)
            return ("x", *old) if texts else tuple(x + 0.01 for x in old)


def test_what_a_resumed_run_may_change() -> None:
    """By field, from the list of the design: paths, cadence and layout, nothing that is learnt."""
    problems = [said for path, _ in field_paths() if (said := what_a_resume_gets_wrong(path))]
    assert not problems, "\n".join(problems)


def what_a_resume_gets_wrong(path: str) -> str:
    before = plan("optim.passes=2") if path == "optim.passes" else plan()
    section, _, leaf = path.rpartition(".")
    change = {leaf: other_value(path, value_at(before.config, path))}
    if section:  # not validated: some fields go only with others, and here one changes
        part = getattr(before.config, section).model_copy(update=change)
        change = {section: part}
    after = before.config.model_copy(update=change)
    allowed, refused = changes(before.config, after)
    old, new = value_at(before.config, path), value_at(after, path)
    if [*allowed, *refused] != [f"{path}: {old} -> {new}"]:
        return f"{path}: said as {[*allowed, *refused]}"
    # what the curation chooses is held by the digest of the shards
    curation = ("curate", "quality", "dedup", "leaks", "retrieve", "balance", "mix")
    # what an adaptation derived stands in other sections; a guard ends a run and teaches nothing
    beside = ("adapt", "guard", "start")
    later = ("evaluate", "export", "finetune", "embed", "search", "look", "serve")
    harmless = section in ("track", "resources", *beside, *later, *curation) or path in (
        "run.folder",
        "data.source",
        "data.shards",
        "data.max_bad_fraction",
        "train.workers",
        "train.accumulation",
        "train.compile",
        "train.strategy",
        "train.activation_checkpointing",
        "train.loss_kernels",
        "train.profile_steps",
        "train.log_every",
        "train.eval_every",
        "train.save_every",
        "train.keep_last",
        "train.max_restarts",
    )
    return "" if bool(allowed) is harmless else f"{path}: allowed {allowed}, refused {refused}"


def test_what_may_change_are_fields() -> None:
    known = [path for path, _ in field_paths()]
    for entry in MAY_CHANGE:
        assert entry in known or any(
            entry.endswith(".") and path.startswith(entry) for path in known
        )


def test_nothing_changed() -> None:
    assert changes(plan().config, plan().config) == ([], [])


def test_the_length_of_a_step_is_derived_only_here() -> None:
    """A plan's grid and evaluation size follow from the config alone."""
    result = plan("augment.global_size=28", "model.patch_size=7", "augment.local_size=7")
    assert result.grid == (4, 4)
    assert result.evaluation_size == 28
    assert plan("evaluate.image_size=42").evaluation_size == 42
    assert math.prod(result.grid) == 16


@pytest.mark.parametrize("image_bytes", [0, 10_000, 6 * 2**20, 40 * 2**20])
def test_large_images_make_small_chunks(image_bytes):
    values = {"optim": {"steps": 1, "global_batch_size": 64}, "train": {"workers": 1}}
    result = resolve(
        Config.model_validate(values),
        SetFacts(64, "d", image_bytes=image_bytes),
        machine=Machine(cpus=8, gpus=0, bfloat16=False),
    )
    most = max(d for d in (1, 2, 4, 8, 16, 32, 64) if d * image_bytes <= ENCODED_BYTES or d == 1)
    assert result.chunk_images == most


@pytest.mark.parametrize("meta", [{}, {"plan": None}, {"plan": []}, {"plan": {"steps": "x"}}])
def test_a_checkpoint_without_a_plan_is_one_sentence(meta: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match=r"meta.json of step-7 holds no plan .*: plan") as caught:
        plan_of(meta, "step-7")
    assert caught.value.hint and "\n" not in caught.value.what


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ("[8,11]", "ends after the last step, 10"),
        ("[6,5]", r"did you mean \[5,6\]"),
        ("[0,5]", "greater than 0"),
        ("[1,51]", r"at most 50: \[1,50\]"),
    ],
)
def test_steps_to_trace_must_be_steps_of_the_run(steps: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(f"train.profile_steps={steps}")
    assert plan("train.profile_steps=[9,10]").config.train.profile_steps == (9, 10)


def test_what_large_networks_need_is_looked_at_before_a_run() -> None:
    shared = Machine(cpus=16, gpus=1, bfloat16=True)
    with pytest.raises(ConfigError, match="fsdp needs a whole GPU for each worker"):
        plan("train.strategy=fsdp", "resources.gpus_per_worker=0.5", machine=shared)
    with pytest.raises(ConfigError, match="dinov2, not timm"):
        plan("train.residual=bfloat16", "model.encoder=timm:test_vit")
    for where in ([], ["train.device=cpu"]):
        with pytest.raises(ConfigError, match=r"loss_kernels=triton needs GPUs, .* on CPUs"):
            plan("train.loss_kernels=triton", *where)
    with pytest.raises(PlacementError, match="GPU"):  # that they are missing is said then
        plan("train.loss_kernels=triton", "train.device=cuda")
    assert plan("train.loss_kernels=triton", machine=shared).device == "cuda"
    for strategy in ("ddp", "fsdp"):
        assert plan(f"train.strategy={strategy}", "train.residual=bfloat16").steps == 10
