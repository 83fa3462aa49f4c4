from types import SimpleNamespace

import pytest
import torch

from pipeline.train import build
from pipeline.train.ahead import ViewMaker
from pipeline.views.batch import Batch
from pipeline.views.masked import PatchFinder
from pipeline.views.photometric import (
    PARAMS,
    CompiledPhotometric,
    PhotometricSpec,
    apply_photometric,
)


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

    cpu = torch.device("cpu")
    views = ViewMaker(PhotometricSpec(), colours, cpu, torch.float32, PatchFinder(0))(batch)
    assert seen == [((4, 8, 8, 3), (4, PARAMS)), ((6, 6, 6, 3), (6, PARAMS))]
    assert (views.global_views == 7).all() and (views.local_views == 7).all()
