"""Each operation, one by one, against torchvision: 1,000 random draws on every road.

The tolerances are those of the table in docs/decoding.md, in units of 1 (an 8-bit step is 3.9e-3).
"""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.pack.demo.tiles import _photographs
from pipeline.views import photometric as ph

functional = pytest.importorskip("torchvision.transforms.v2.functional")

DRAWS = 1000
SIDES = ((24, 24), (17, 31), (33, 19), (5, 5), (5, 48))  # 5 is the least that 9 taps can reflect
PLAIN = ph.PhotometricSpec(mean=(0.0,) * 3, std=(1.0,) * 3)
SPEC = ph.PhotometricSpec()

# Worst error of all roads allowed for each operation.
TOLERANCES = {
    "brightness": 1e-7,
    "contrast": 5e-7,
    "saturation": 5e-7,
    "hue": 3e-6,
    "greyscale": 3e-7,
    "blur": 1.5e-6,
    "solarize": 1e-7,
    "normalise": 5e-7,
    "all in the drawn order": 4e-6,
}


@functools.cache
def photographs() -> list[np.ndarray]:
    return [np.asarray(photo.convert("RGB")) for photo in _photographs().values()]


def crops(count: int, sides: tuple[int, int], seed: int) -> Tensor:
    """Half pieces of photographs, half noise; some grey, flat, black, white, or two-valued."""
    rng = np.random.default_rng(seed)
    photos = photographs()
    height, width = sides
    out = rng.integers(0, 256, (count, height, width, 3), np.uint8)
    for i in range(0, count, 2):
        photo = photos[int(rng.integers(len(photos)))]
        top = int(rng.integers(photo.shape[0] - height))
        left = int(rng.integers(photo.shape[1] - width))
        out[i] = photo[top : top + height, left : left + width]
    out[::7, :, :, 1:] = out[::7, :, :, :1]  # no colour
    out[1::13] = out[1::13, :1, :1]  # one colour
    out[2::17] = (out[2::17] > 127) * np.uint8(255)  # only corners of the colour cube
    out[3], out[4], out[5] = 0, 255, 128
    return torch.from_numpy(out)


def neutral(count: int) -> Tensor:
    params = torch.zeros(count, ph.PARAMS)
    params[:, [ph.BRIGHTNESS, ph.CONTRAST, ph.SATURATION]] = 1
    return params


def each(x: Tensor, params: Tensor, spec: ph.PhotometricSpec) -> Tensor:
    """What a CPU does with crops that are not small."""
    return ph._apply_to_each(x, params, spec, torch.float32)


def some(x: Tensor, params: Tensor, spec: ph.PhotometricSpec) -> Tensor:
    """What a CPU does with small crops, and an accelerator that nothing is compiled for."""
    return ph._normalised(ph._apply_to_some(ph._floats(x), params, spec), spec, torch.float32)


def every(x: Tensor, params: Tensor, spec: ph.PhotometricSpec) -> Tensor:
    """What an accelerator does, before it is compiled."""
    return ph._normalised(ph._apply_to_all(ph._floats(x), params, spec), spec, torch.float32)


ROADS = (each, some, every)


def drawn(operation: str, count: int, rng: np.random.Generator) -> tuple[Tensor, list[float]]:
    """Parameters of one operation, stronger than any recipe, and its strength for torchvision."""
    params, strength = neutral(count), np.zeros(count)
    column = {
        "brightness": ph.BRIGHTNESS,
        "contrast": ph.CONTRAST,
        "saturation": ph.SATURATION,
        "hue": ph.HUE,
        "greyscale": ph.GREY,
        "blur": ph.BLUR_SIGMA,
        "solarize": ph.SOLARIZE,
    }.get(operation)
    if operation in ("brightness", "contrast", "saturation"):
        strength = rng.uniform(0, 2, count)
        strength[:4] = (0, 1, 1 - 1e-7, 1 + 1e-6)
    elif operation == "hue":
        strength = rng.uniform(-0.5, 0.5, count)
        strength[:8] = (-0.5, 0.5, 0, 1 / 3, -1 / 3, 1 / 6, -1 / 6, 1e-7)
    elif operation == "blur":
        strength = rng.uniform(0.1, 2.0, count)
        strength[:6] = (0.02, 0.05, 0.1, 0.16, 0.2, 5.0)
    elif column is not None:
        strength = np.ones(count)
    if column is not None:
        params[:, column] = torch.from_numpy(strength).float()
        params[:, ph.JITTER] = column <= ph.HUE
        params[:, ph.ORDER] = torch.arange(count) % 24
        return params, params[:, column].tolist()
    return params, strength.tolist()


THEIRS = {
    "brightness": functional.adjust_brightness,
    "contrast": functional.adjust_contrast,
    "saturation": functional.adjust_saturation,
    "hue": functional.adjust_hue,
    "greyscale": lambda x, _: functional.rgb_to_grayscale(x, num_output_channels=3),
    "blur": lambda x, sigma: functional.gaussian_blur(x, [9, 9], [sigma] * 2),
    "solarize": lambda x, _: functional.solarize(x, 128 / 255),
    "normalise": lambda x, _: functional.normalize(x, SPEC.mean, SPEC.std),
}


def chain(x: Tensor, row: list[float], solarize: bool) -> Tensor:
    """All of them as DINOv2 orders them, for one crop [3, H, W] in [0, 1]."""
    if row[ph.JITTER]:
        for column in ph.ORDERS[int(row[ph.ORDER])]:
            x = tuple(THEIRS.values())[column](x, row[column])
    if row[ph.GREY]:
        x = THEIRS["greyscale"](x, 1.0)
    if row[ph.BLUR_SIGMA]:
        x = THEIRS["blur"](x, row[ph.BLUR_SIGMA])
    return THEIRS["solarize"](x, 1.0) if row[ph.SOLARIZE] and solarize else x


def floats(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).float() / 255  # as ToTensor


def worst(operation: str, count: int = DRAWS) -> dict[str, float]:
    """Largest error of each road."""
    rng, errors = np.random.default_rng(0), dict.fromkeys((road.__name__ for road in ROADS), 0.0)
    spec = SPEC if operation == "normalise" else PLAIN
    for part, sides in enumerate(SIDES):
        number = count // len(SIDES)
        params, strength = drawn(operation, number, rng)
        x = crops(number, sides, part)
        rows = zip(floats(x), strength, strict=True)
        expected = torch.stack([THEIRS[operation](c, s) for c, s in rows])
        for road in ROADS:
            error = (road(x, params, spec) - expected).abs().max()
            errors[road.__name__] = max(errors[road.__name__], float(error))
    return errors


@pytest.mark.parametrize("operation", THEIRS)
def test_one_operation_equals_torchvision_on_all_roads(operation):
    errors = worst(operation)
    assert max(errors.values()) <= TOLERANCES[operation], errors


def worst_chain(roads, count: int = DRAWS, sides=SIDES) -> dict[str, float]:
    """Largest error of all operations in the drawn order, and between the roads themselves."""
    errors = dict.fromkeys((*(road.__name__ for road in roads), "between"), 0.0)
    for part, size in enumerate(sides):
        number = count // len(sides)
        u = np.random.default_rng(part).random((number, 3, ph.PHOTOMETRIC_DRAWS))
        params = torch.from_numpy(ph.draw_photometric(u, SPEC))
        params = params[torch.arange(number), torch.arange(number) % 3]  # all kinds of views
        x = crops(number, size, 10 + part)
        rows = list(zip(floats(x), params.tolist(), strict=True))
        before = torch.stack([chain(c, row, solarize=False) for c, row in rows])
        expected = torch.stack([chain(c, row, solarize=True) for c, row in rows])
        # Solarize jumps by an 8-bit step at its threshold, which round-off may cross.
        edge = ((before - 128 / 255).abs() < 1e-5) & (params[:, ph.SOLARIZE, None, None, None] > 0)
        assert edge.float().mean() < 2e-3
        outputs = [road(x, params, PLAIN) for road in roads]
        for road, ours in zip(roads, outputs, strict=True):
            error = (ours - expected).abs()[~edge].max()
            errors[road.__name__] = max(errors[road.__name__], float(error))
        apart = max(float((a - outputs[0]).abs()[~edge].max()) for a in outputs)
        errors["between"] = max(errors["between"], apart)
    return errors


def test_all_operations_in_the_drawn_order_equal_torchvision_on_all_roads():
    errors = worst_chain(ROADS)
    assert max(errors.values()) <= TOLERANCES["all in the drawn order"], errors


@pytest.mark.slow
def test_compiled_code_equals_torchvision():
    """The code of torch.compile's own generator on the CPU; it takes minutes to make."""
    compiled = torch.compile(ph.apply_photometric, fullgraph=True, dynamic=False)

    def generated(x, params, spec):
        return compiled(x, params, spec, torch.float32)

    errors = worst_chain((generated, each), 400, ((24, 24),))
    assert max(errors.values()) <= 2 * TOLERANCES["all in the drawn order"], errors


@pytest.mark.parametrize("road", ROADS)
def test_solarize_at_its_threshold_before_and_after_a_blur(road):
    x = torch.tensor([127, 128, 129], dtype=torch.uint8)[:, None, None, None].repeat(1, 9, 9, 3)
    params = neutral(3)
    params[:, ph.SOLARIZE] = 1
    for sigma in (0.0, 0.1, 0.7, 2.0):  # a blur changes a flat crop by round-off only
        params[:, ph.BLUR_SIGMA] = sigma
        values = road(x, params, PLAIN)[:, 0] * 255
        for crop, value in zip(values, (127.0, 127.0, 126.0), strict=True):
            torch.testing.assert_close(crop, torch.full((9, 9), value))


@pytest.mark.parametrize("road", ROADS)
def test_grey_pixels_keep_their_value_under_hue(road):
    x = torch.arange(256, dtype=torch.uint8)[None, None, :, None].repeat(3, 9, 1, 3)
    params = neutral(3)
    params[:, ph.JITTER], params[:, ph.HUE] = 1, torch.tensor([-0.5, 0.1, 0.37])
    assert torch.equal(road(x, params, PLAIN), floats(x))


@pytest.mark.parametrize(
    ("side", "road"), [(52, "_apply_to_some"), (53, "_apply_to_each"), (98, "_apply_to_each")]
)
def test_the_size_of_a_crop_chooses_the_road_and_not_the_result(side, road, monkeypatch):
    x = crops(12, (side, side), 5)
    u = np.random.default_rng(5).random((4, 3, ph.PHOTOMETRIC_DRAWS))
    params = torch.from_numpy(ph.draw_photometric(u, PLAIN)).flatten(0, 1)
    params[:, ph.SOLARIZE] = 0
    expected = torch.stack(
        [chain(c, row, True) for c, row in zip(floats(x), params.tolist(), strict=True)]
    )
    taken = []
    for name in ("_apply_to_some", "_apply_to_each"):
        function = getattr(ph, name)

        def noted(*arguments, name=name, function=function):
            taken.append(name)
            return function(*arguments)

        monkeypatch.setattr(ph, name, noted)
    ours = ph.apply_photometric(x, params, PLAIN)
    assert set(taken) == {road}
    assert (ours - expected).abs().max() <= TOLERANCES["all in the drawn order"]


def test_crops_that_cannot_be_reflected_are_refused():
    with pytest.raises(DataError, match="4 x 9 pixels are too small for a blur of 9"):
        ph.apply_photometric(torch.zeros(1, 4, 9, 3, dtype=torch.uint8), neutral(1), SPEC)
    calm = ph.PhotometricSpec(blur_probability=(0.0, 0.0, 0.0))
    assert ph.apply_photometric(
        torch.zeros(1, 4, 9, 3, dtype=torch.uint8), neutral(1), calm
    ).shape == (1, 3, 4, 9)


@pytest.mark.parametrize("road", ROADS)
def test_neutral_numbers_change_no_bit(road):
    x, params = crops(48, (9, 11), 3), neutral(48)
    params[:, ph.JITTER], params[:, ph.ORDER] = 1, torch.arange(48) % 24
    assert torch.equal(road(x, params, PLAIN), floats(x))


def test_bfloat16_is_the_rounded_float32():
    x = crops(60, (9, 11), 4)
    u = np.random.default_rng(4).random((20, 3, ph.PHOTOMETRIC_DRAWS))
    params = torch.from_numpy(ph.draw_photometric(u, SPEC)).flatten(0, 1)
    full, half = (ph.apply_photometric(x, params, SPEC, d) for d in (torch.float32, torch.bfloat16))
    assert torch.equal(half, full.bfloat16())
    dense = ph._apply_to_all(ph._floats(x), params, SPEC)
    full, half = (ph._normalised(dense, SPEC, d) for d in (torch.float32, torch.bfloat16))
    assert torch.equal(half, full.bfloat16())
