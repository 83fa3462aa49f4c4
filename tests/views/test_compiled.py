import numpy as np
import pytest
import torch

from pipeline.views import photometric as ph
from pipeline.views.photometric import CompiledPhotometric

SPEC = ph.PhotometricSpec()


@pytest.fixture
def graphs():
    """A list that gets each graph that is compiled; what other tests compiled is forgotten."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def make(graphs):
    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return CompiledPhotometric(backend)


def inputs(count: int, side: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    u = np.random.default_rng(seed).random((count, 3, ph.PHOTOMETRIC_DRAWS))
    return x, torch.from_numpy(ph.draw_photometric(u, SPEC))[:, 2]


@pytest.mark.long
def test_one_graph_for_each_size_of_crops(graphs):
    apply, count = make(graphs), 8
    for step in range(3):
        for views, side in ((2, 14), (3, 9)):
            x, params = inputs(views * count, side, step)
            compiled_views = apply(x, params, SPEC)
            assert compiled_views.shape == (views * count, 3, side, side)
            torch.testing.assert_close(
                compiled_views, ph.apply_photometric(x, params, SPEC), atol=3e-5, rtol=0
            )
    assert len(graphs) == 2


def test_a_graph_copies_nothing_from_the_host_and_reads_nothing_back(graphs):
    x, params = inputs(6, 9)
    make(graphs)(x, params, SPEC)
    (graph,) = graphs
    # Constants would be tensors of the CPU on their way to the device.
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"]
    names = {str(node.target) for node in graph.graph.nodes if node.op != "placeholder"}
    for waits in ("item", "tolist", "nonzero", "cpu", "tensor", "_local_scalar_dense"):
        assert not [name for name in names if name.split(".")[-1] == waits], names
    inputs_ = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(inputs_) == 2  # crops and parameters


def test_no_crops_and_another_dtype(graphs):
    apply = make(graphs)
    x, params = inputs(4, 9)
    assert apply(x[:0], params[:0], SPEC).shape == (0, 3, 9, 9)
    half = apply(x, params, SPEC, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    full = ph.apply_photometric(x, params, SPEC)
    torch.testing.assert_close(half.float(), full, atol=2e-2, rtol=0)


@pytest.mark.gpu
def test_the_device_gives_what_the_cpu_gives():
    torch._dynamo.reset()
    apply = CompiledPhotometric()
    x, params = inputs(64, 98)
    calm = params[:, ph.SOLARIZE] == 0  # round-off may cross its threshold
    expected = ph.apply_photometric(x, params, SPEC)[calm]
    for road in (apply, ph.apply_photometric):
        on_device = road(x.cuda(), params, SPEC).cpu()[calm]
        torch.testing.assert_close(on_device, expected, atol=5e-5, rtol=0)
