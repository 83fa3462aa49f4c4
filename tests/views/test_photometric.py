import itertools

import numpy as np
import pytest
import torch

from pipeline.views import photometric as ph

functional = pytest.importorskip("torchvision.transforms.v2.functional")

SPEC = ph.PhotometricSpec()
PLAIN = ph.PhotometricSpec(mean=(0.0,) * 3, std=(1.0,) * 3)
TOLERANCE = 3e-6  # of 1; one operation in float32


def crops(count: int, size: int = 20, seed: int = 0) -> torch.Tensor:
    """Noise, flat greys and saturated colours: uint8 [N, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    x[::5] = x[::5, :1, :1]  # one colour
    x[::7, :, :, 1:] = x[::7, :, :, :1]  # no colour
    x[::11] = (x[::11] > 127) * 255  # only corners of the colour cube
    return x


def floats(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2).float() / 255


def neutral(count: int) -> torch.Tensor:
    params = torch.zeros(count, ph.PARAMS)
    params[:, [ph.BRIGHTNESS, ph.CONTRAST, ph.SATURATION]] = 1
    return params


def drawn(count: int, spec: ph.PhotometricSpec = SPEC, seed: int = 0) -> torch.Tensor:
    u = np.random.default_rng(seed).random((count // 10, 10, ph.PHOTOMETRIC_DRAWS))
    return torch.from_numpy(ph.draw_photometric(u, spec)).flatten(0, 1)


def theirs(x: torch.Tensor, row: torch.Tensor, solarize: bool = True) -> torch.Tensor:
    """One crop [3, H, W] through torchvision, one operation after the other."""
    jitter = {
        ph.BRIGHTNESS: functional.adjust_brightness,
        ph.CONTRAST: functional.adjust_contrast,
        ph.SATURATION: functional.adjust_saturation,
        ph.HUE: functional.adjust_hue,
    }
    values = row.tolist()
    if values[ph.JITTER]:
        for column in ph.ORDERS[int(values[ph.ORDER])]:
            x = jitter[column](x, values[column])
    if values[ph.GREY]:
        x = functional.rgb_to_grayscale(x, num_output_channels=3)
    if values[ph.BLUR_SIGMA]:
        x = functional.gaussian_blur(x, [9, 9], [values[ph.BLUR_SIGMA]] * 2)
    if values[ph.SOLARIZE] and solarize:
        x = functional.solarize(x, 128 / 255)
    return x


def dense(x: torch.Tensor, params: torch.Tensor, spec: ph.PhotometricSpec) -> torch.Tensor:
    """The path of accelerators and of torch.compile, here on the CPU."""
    out = ph._apply_to_all(floats(x).contiguous(), params, spec)
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    return (out - mean[:, None, None]) / std[:, None, None]


def each(x: torch.Tensor, params: torch.Tensor, spec: ph.PhotometricSpec) -> torch.Tensor:
    """The path of crops that are not small on the CPU."""
    return ph._apply_to_each(x, params, spec, torch.float32)


PATHS = pytest.mark.parametrize(
    "apply", [ph.apply_photometric, each, dense], ids=["some", "each", "all"]
)


@PATHS
@pytest.mark.parametrize("column", range(4))
def test_each_jitter_operation_equals_torchvision(apply, column):
    count = 220
    x, params = crops(count), neutral(count)
    limits = {ph.HUE: (-0.5, 0.5)}.get(column, (0.0, 2.5))
    params[:, column] = torch.linspace(*limits, count)
    params[:, ph.ORDER] = torch.arange(count) % 24
    params[:, ph.JITTER] = 1
    ours = apply(x, params, PLAIN)
    expected = torch.stack([theirs(c, p) for c, p in zip(floats(x), params, strict=True)])
    assert (ours - expected).abs().max() < TOLERANCE


@PATHS
@pytest.mark.parametrize("column", [ph.GREY, ph.BLUR_SIGMA, ph.SOLARIZE])
def test_each_other_operation_equals_torchvision(apply, column):
    count = 220
    x, params = crops(count), neutral(count)
    params[1::2, column] = torch.linspace(0.1, 2.0, count // 2) if column == ph.BLUR_SIGMA else 1
    ours = apply(x, params, PLAIN)
    expected = torch.stack([theirs(c, p) for c, p in zip(floats(x), params, strict=True)])
    assert (ours - expected).abs().max() < TOLERANCE
    assert torch.equal(ours[::2], floats(x)[::2])  # the others are not touched at all


@PATHS
def test_everything_in_the_drawn_order_equals_torchvision(apply):
    params = drawn(400)
    x = crops(400)
    ours = apply(x, params, SPEC)
    before = [theirs(c, p, solarize=False) for c, p in zip(floats(x), params, strict=True)]
    expected = torch.stack([theirs(c, p) for c, p in zip(floats(x), params, strict=True)])
    normalised = functional.normalize(expected, SPEC.mean, SPEC.std)
    # Round-off may move a value over the threshold of solarize, where it jumps.
    edge = (torch.stack(before) - 128 / 255).abs() < 1e-5
    edge &= params[:, ph.SOLARIZE, None, None, None] > 0
    assert edge.float().mean() < 1e-3
    assert (ours - normalised).abs()[~edge].max() < 4 * TOLERANCE / 0.224


def test_compiles_into_one_graph_with_the_same_result():
    params, x = drawn(20), crops(20)
    compiled = torch.compile(ph.apply_photometric, backend="eager", fullgraph=True, dynamic=False)
    ours = compiled(x, params, SPEC, torch.float32)
    torch.testing.assert_close(ours, dense(x, params, SPEC))


def test_solarize_inverts_from_128_on():
    x = (
        torch.tensor([127, 128, 129], dtype=torch.uint8)
        .view(1, 1, 3, 1)
        .expand(1, 6, 3, 3)
        .repeat(1, 1, 3, 1)
    )
    params = neutral(1)
    params[:, ph.SOLARIZE] = 1
    for apply in (ph.apply_photometric, dense):
        values = apply(x, params, PLAIN)[0, 0, 0, :3] * 255
        torch.testing.assert_close(values, torch.tensor([127.0, 127.0, 126.0]))


@pytest.mark.parametrize("size", [20, 60])
def test_the_result_of_a_crop_does_not_depend_on_its_company(size):
    params, x = drawn(60), crops(60, size)
    together = ph.apply_photometric(x, params, SPEC)
    for i in range(0, 60, 7):
        alone = ph.apply_photometric(x[i : i + 1], params[i : i + 1], SPEC)
        assert torch.equal(alone[0], together[i])


def test_output_dtype_layout_and_inputs():
    params, x = drawn(20), crops(20)
    kept = x.clone()
    full = ph.apply_photometric(x, params, SPEC)
    half = ph.apply_photometric(x, params, SPEC, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and full.dtype == torch.float32
    assert torch.equal(half, full.bfloat16()), "colour must be computed in float32"
    assert full.shape == (20, 3, 20, 20) and full.is_contiguous()
    assert torch.equal(x, kept)
    assert ph.apply_photometric(x[:0], params[:0], SPEC).shape == (0, 3, 20, 20)


def channel_by_channel(x: torch.Tensor, row: torch.Tensor, solarize: bool = True) -> torch.Tensor:
    """One crop [C, H, W], C != 3, through torchvision: planes, nothing that needs colours."""
    values = row.tolist()

    def contrast(planes: torch.Tensor, factor: float) -> torch.Tensor:
        # One tall grey image has the mean of all channels.
        return functional.adjust_contrast(planes.flatten(0, 1)[None], factor).view_as(planes)

    def brightness(planes: torch.Tensor, factor: float) -> torch.Tensor:
        return torch.cat([functional.adjust_brightness(p[None], factor) for p in planes])

    if values[ph.JITTER]:
        for column in ph.ORDERS[int(values[ph.ORDER])]:
            if column in (ph.BRIGHTNESS, ph.CONTRAST):
                x = (brightness, contrast)[column](x, values[column])
    if values[ph.BLUR_SIGMA]:
        sigma = [values[ph.BLUR_SIGMA]] * 2
        x = torch.cat([functional.gaussian_blur(plane[None], [9, 9], sigma) for plane in x])
    if values[ph.SOLARIZE] and solarize:
        x = torch.cat([functional.solarize(plane[None], 128 / 255) for plane in x])
    return x


@PATHS
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_channels_that_are_no_colours(apply, channels):
    mean = tuple(0.1 * (c + 1) for c in range(channels))
    spec = ph.PhotometricSpec(mean=mean, std=(0.25,) * channels)
    params = drawn(200)  # as for RGB: saturation, hue and greyscale among them
    x = torch.cat((crops(200), crops(200, seed=1)), 3)[..., :channels].contiguous()
    ours = apply(x, params, spec)
    assert ours.shape == (200, channels, 20, 20)
    rows = list(zip(floats(x), params, strict=True))
    before = torch.stack([channel_by_channel(c, p, solarize=False) for c, p in rows])
    expected = torch.stack([channel_by_channel(c, p) for c, p in rows])
    edge = (before - 128 / 255).abs() < 1e-5
    edge &= params[:, ph.SOLARIZE, None, None, None] > 0
    assert edge.float().mean() < 1e-3
    shift = torch.tensor(mean)[:, None, None]
    assert (ours - (expected - shift) / 0.25).abs()[~edge].max() < 4 * TOLERANCE / 0.25


def test_one_channel_has_the_contrast_and_brightness_of_a_grey_picture():
    params = drawn(100)
    params[:, ph.SATURATION] = 1  # the luma weights sum to 0.9999: saturation moves greys a little
    spec = ph.PhotometricSpec(mean=(0.0,), std=(1.0,))
    x = crops(100)[..., :1].contiguous()
    coloured = ph.apply_photometric(x.expand(-1, -1, -1, 3), params, PLAIN)
    # Solarize jumps at its threshold, so the two may differ there by more than round-off.
    calm = params[:, ph.SOLARIZE] == 0
    grey = ph.apply_photometric(x, params, spec)
    assert (grey - coloured).abs()[calm].max() < 2e-4


def test_skipped_operations_change_nothing():
    assert ph.skipped_operations(3) == ()
    names = {"saturation": ph.SATURATION, "hue": ph.HUE, "greyscale": ph.GREY}
    for channels in (1, 2, 4, 6):
        assert ph.skipped_operations(channels) == tuple(names)
        spec = ph.PhotometricSpec(mean=(0.0,) * channels, std=(1.0,) * channels)
        x = torch.cat((crops(48), crops(48, seed=1)), 3)[..., :channels].contiguous()
        params = neutral(48)
        params[:, ph.JITTER] = params[:, ph.GREY] = 1
        params[:, ph.SATURATION], params[:, ph.HUE] = 1.7, 0.3
        params[:, ph.ORDER] = torch.arange(48) % 24
        for apply in (ph.apply_photometric, dense):
            assert torch.equal(apply(x, params, spec), floats(x))


def test_parameters_have_the_stated_law():
    params = ph.draw_photometric(
        np.random.default_rng(3).random((20_000, 4, ph.PHOTOMETRIC_DRAWS)), SPEC
    )
    assert params.shape == (20_000, 4, ph.PARAMS) and params.dtype == np.float32
    three_sigma = 3 * 0.5 / np.sqrt(20_000)
    for view, (blur, solarize) in enumerate(((0, 0), (0.9, 0.2), (0.5, 0), (0.5, 0))):
        p = params[:, view]
        frequency = [(p[:, c] > 0).mean() for c in (ph.JITTER, ph.GREY, ph.BLUR_SIGMA, ph.SOLARIZE)]
        np.testing.assert_allclose(frequency, (0.8, 0.2, blur, solarize), atol=three_sigma)
    for column, (low, high) in enumerate(((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))):
        values = params[..., column]
        np.testing.assert_allclose((values.min(), values.max()), (low, high), atol=1e-3)
        np.testing.assert_allclose(values.mean(), (low + high) / 2, atol=3e-3)
    sigma = params[:, 2, ph.BLUR_SIGMA]
    np.testing.assert_allclose((sigma[sigma > 0].min(), sigma.max()), (0.1, 2), atol=1e-3)
    orders, counts = np.unique(params[..., ph.ORDER], return_counts=True)
    assert orders.tolist() == list(range(24))
    assert counts.min() > 0.9 * params[..., 0].size / 24
    assert sorted(ph.ORDERS) == sorted(itertools.permutations(range(4)))


def test_frequencies_are_those_measured_on_the_reference(shared):
    import json

    measured = json.loads((shared / "golden/aug/op_probabilities.json").read_text())["empirical"]
    u = np.random.default_rng(0).random((5000, 3, ph.PHOTOMETRIC_DRAWS))
    params = ph.draw_photometric(u, SPEC)
    columns = {
        "jitter": ph.JITTER,
        "gray": ph.GREY,
        "blur": ph.BLUR_SIGMA,
        "solarize": ph.SOLARIZE,
    }
    for view, name in enumerate(("global1", "global2", "local")):
        for operation, column in columns.items():
            ours = (params[:, view, column] > 0).mean()
            # four standard deviations of a frequency measured on 500 images
            spread = 4 * np.sqrt(max(ours * (1 - ours), 1e-9) / 500)
            assert abs(ours - measured[f"{name}/{operation}"]) <= spread + 1e-9


def test_views_have_the_brightness_and_contrast_of_the_reference(shared):
    """Mean and deviation of whole normalised views, against 3 x 10 of the reference's own pipeline
    on the same picture. Draws differ, so the mean of theirs must lie within four standard errors
    of ours.
    """
    from pipeline.views.crops import CropSpec, crop_boxes, cut_crops
    from pipeline.views.draws import uniforms

    golden = torch.load(shared / "golden/aug/seeded_crops.pt", weights_only=True)
    image = golden["image_uint8"].numpy()
    spec, crop = ph.PhotometricSpec(blur_probability=(0.0, 0.9, 0.5)), CropSpec()
    ids = np.random.default_rng(0).integers(0, 256, (120, 16), np.uint8)
    u = uniforms(0, 0, ids, crop.draws, 0)
    colour = uniforms(0, 0, ids, 10 * ph.PHOTOMETRIC_DRAWS, 1).reshape(-1, 10, ph.PHOTOMETRIC_DRAWS)
    params = torch.from_numpy(ph.draw_photometric(colour, spec))
    ours = {"global": [], "local": []}
    for row in range(len(ids)):
        boxes, flips = crop_boxes(u[row], image.shape[1], image.shape[0], crop)
        cut = cut_crops(image, boxes, flips, crop)
        for name, crops, drawn_for in zip(ours, cut, params[row].split([2, 8]), strict=True):
            ours[name].append(ph.apply_photometric(torch.as_tensor(crops), drawn_for, spec))
    for name, views in ours.items():
        flat = torch.cat(views).flatten(1)
        for what, values in (("mean", flat.mean(1)), ("std", flat.std(1))):
            theirs = torch.tensor([x for out in golden["outs"] for x in out[f"{name}_{what}"]])
            error = 4 * float(values.std()) / len(theirs) ** 0.5
            assert float(theirs.mean()) == pytest.approx(float(values.mean()), abs=error)
