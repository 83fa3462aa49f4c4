from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.train import build
from pipeline.train.ahead import ViewMaker, tensors_of
from pipeline.views.batch import Batch
from pipeline.views.masked import PatchFinder, usual_length
from pipeline.views.photometric import (
    PARAMS,
    PHOTOMETRIC_DRAWS,
    CompiledPhotometric,
    PhotometricSpec,
    apply_photometric,
    draw_photometric,
)
from tests.train.small_run import OTHER_HEAD, Run, assert_same
from tests.train.test_start import planned

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "compiles", "expected"),
    [("cuda", True, True), ("cuda", False, False), ("cpu", True, False), ("cpu", False, False)],
)
def test_colours_are_compiled_on_an_accelerator_where_the_networks_are(device, compiles, expected):
    colours = build.photometric_function(SimpleNamespace(compile=compiles), torch.device(device))
    assert isinstance(colours, CompiledPhotometric) == expected
    assert expected or colours is apply_photometric


def test_views_are_made_by_the_colour_function_of_the_run():
    batch = Batch(
        torch.zeros(2, 16, dtype=torch.uint8),
        torch.zeros(2, 2, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 6, 6, 3, dtype=torch.uint8),
        torch.ones(2, 5, PARAMS),
        torch.zeros(2, 2, 4, dtype=torch.bool),
        torch.zeros(2, dtype=torch.int64),
    )
    seen = []

    def colours(crops, params, spec, dtype):
        seen.append((tuple(crops.shape), tuple(params.shape)))
        return torch.full((len(crops), 3, *crops.shape[1:3]), 7.0, dtype=dtype)

    views = ViewMaker(PhotometricSpec(), colours, CPU, torch.float32, PatchFinder(0))(batch)
    assert seen == [((4, 8, 8, 3), (4, PARAMS)), ((6, 6, 6, 3), (6, PARAMS))]
    assert (views.global_views == 7).all() and (views.local_views == 7).all()


def batch(images: int = 4) -> Batch:
    rng = np.random.default_rng(0)

    def crops(count: int, side: int) -> np.ndarray:
        return rng.integers(0, 256, (images, count, side, side, 3), np.uint8)

    return Batch.from_chunk(
        {
            "image_ids": np.zeros((images, 16), np.uint8),
            "global_crops": crops(2, 28),
            "local_crops": crops(2, 14),
            "photometric": draw_photometric(
                rng.random((images, 4, PHOTOMETRIC_DRAWS)), PhotometricSpec()
            ),
            "masks": rng.random((images, 2, 4)) < 0.4,
            "labels": np.zeros(images, np.int64),
            "valid": np.ones(images, bool),
        }
    )


@pytest.mark.parametrize("colours", [apply_photometric, CompiledPhotometric("eager")])
def test_views_in_bfloat16_give_the_networks_the_same_bits(colours):
    runs = [Run(ibot=OTHER_HEAD, drop_path=0.3) for _ in range(2)]
    for step in range(2):
        scalars = []
        for run, dtype in zip(runs, (torch.float32, torch.bfloat16), strict=True):
            make = ViewMaker(PhotometricSpec(), colours, CPU, dtype, PatchFinder(16))
            views = make(batch())
            assert views.global_views.dtype == views.local_views.dtype == dtype
            generator = torch.Generator().manual_seed(step)
            result = run.step(views, autocast_dtype=torch.bfloat16, generator=generator)
            scalars.append(result.scalars)
        assert all(torch.equal(scalars[0][name], x) for name, x in scalars[1].items())
    gradients = [[p.grad for p in run.pair.student.parameters()] for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert_same(runs[0].weights(), runs[1].weights(), atol=0)


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (["train.precision=bfloat16"], torch.bfloat16),
        (["train.precision=float32"], torch.float32),
        (["train.precision=bfloat16", "model.encoder=timm:vit_tiny_patch16_224"], torch.float32),
    ],
)
def test_only_our_network_gets_views_in_bfloat16(overrides, dtype):
    size = ["augment.global_size=32", "augment.local_size=16"] if len(overrides) == 2 else []
    if size:
        overrides = [*overrides, *size, "model.patch_size=16"]
    plan = planned(*overrides)
    maker = build.view_maker(plan, build.pair(plan.config), CPU)
    assert maker.dtype == dtype


def test_what_is_scored_follows_from_the_plan():
    plan = planned("optim.global_batch_size=4")  # P = 4 patches in each of 8 views
    assert build.patch_finder(plan) == PatchFinder(usual_length(4, 4, build.mask_spec(plan)))
    assert build.patch_finder(planned("loss.ibot_weight=0")) == PatchFinder(0)
    distil = plan.config.distill.model_copy(update={"teacher": "somewhere"})
    config = plan.config.model_copy(update={"distill": distil})
    every = build.patch_finder(plan.model_copy(update={"config": config}))
    assert every == PatchFinder(8 * 4, every=True)


def test_on_an_accelerator_all_views_have_weights():
    """So that a bad image asks for no kernel that was not there before."""
    meta = torch.device("meta")

    def colours(crops, params, spec, dtype):
        return torch.empty(len(crops), 3, *crops.shape[1:3], dtype=dtype, device=crops.device)

    views = ViewMaker(PhotometricSpec(), colours, meta, torch.bfloat16, PatchFinder(16))(batch())
    assert views.weights is not None and views.weights.shape == (4,)
    assert {x.device for x in tensors_of([views])} == {meta}
    on_cpu = ViewMaker(PhotometricSpec(), colours, CPU, torch.bfloat16, PatchFinder(16))(batch())
    assert on_cpu.weights is None
