"""Colour, blur, solarize and normalisation of the ten crops of an image: cost and shares.

    python benchmarks/colour.py                on a CPU, one thread (and the GPU, if there is one)
    python benchmarks/colour.py --compile      also compiled on the CPU, which takes minutes

Photographs of the demo, 2 crops of 224 and 8 of 98 pixels each, parameters drawn as in training.
On the CPU against torchvision's `v2.functional` on float tensors and against the same operations on
Pillow images, which is what DINOv2's loader does; crop by crop, the same parameters, measured in
turn. On a GPU the share of a training step of ViT-S/14 as well.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as pillow
from torchvision.transforms.v2 import functional as floats

from pipeline.pack.demo.tiles import _photographs
from pipeline.views import photometric as ph
from pipeline.views.crops import CropSpec, crop_boxes, cut_crops
from pipeline.views.draws import uniforms
from pipeline.views.photometric import CompiledPhotometric

IMAGES, ROUNDS = 16, 7
SPEC, CROPS = ph.PhotometricSpec(), CropSpec()
COLUMNS = {
    "brightness": ph.BRIGHTNESS,
    "contrast": ph.CONTRAST,
    "saturation": ph.SATURATION,
    "hue": ph.HUE,
    "greyscale": ph.GREY,
    "blur": ph.BLUR_SIGMA,
    "solarize": ph.SOLARIZE,
}
Part = tuple[Tensor, Tensor]  # uint8 crops [N, H, W, 3] and their parameters


def work() -> list[Part]:
    """Global and local crops of all images with what was drawn for them."""
    photos = [np.asarray(photo.convert("RGB")) for photo in _photographs().values()]
    ids = np.random.default_rng(0).integers(0, 256, (IMAGES, 16), np.uint8)
    boxes_u = uniforms(0, 0, ids, CROPS.draws, 0)
    colour_u = uniforms(0, 0, ids, CROPS.views * ph.PHOTOMETRIC_DRAWS, 1)
    params = torch.from_numpy(
        ph.draw_photometric(colour_u.reshape(IMAGES, CROPS.views, ph.PHOTOMETRIC_DRAWS), SPEC)
    )
    cut = []
    for row in range(IMAGES):
        image = photos[row % len(photos)]
        boxes, flips = crop_boxes(boxes_u[row], image.shape[1], image.shape[0], CROPS)
        cut.append(cut_crops(image, boxes, flips, CROPS))
    globals_, locals_ = (torch.from_numpy(np.concatenate(x)) for x in zip(*cut, strict=True))
    return [
        (globals_, params[:, :2].flatten(0, 1).contiguous()),
        (locals_, params[:, 2:].flatten(0, 1).contiguous()),
    ]


def only(operation: str | None, parts: list[Part]) -> list[Part]:
    """The same crops with one operation on all of them; none for the conversions alone."""
    out = []
    for crops, drawn in parts:
        params = torch.zeros_like(drawn)
        params[:, : ph.HUE] = 1
        if operation:
            column = COLUMNS[operation]
            params[:, column] = drawn[:, column] if column <= ph.HUE else 1
            if column == ph.BLUR_SIGMA:
                params[:, column] = torch.linspace(*SPEC.blur_sigma, len(params))
            params[:, ph.JITTER] = column <= ph.HUE
        out.append((crops, params))
    return out


def ours(parts: list[Part], function: Callable[..., Tensor] = ph.apply_photometric) -> list[Tensor]:
    return [function(crops, params, SPEC) for crops, params in parts]


def torchvision_floats(parts: list[Part]) -> list[Tensor]:
    jitter = (
        floats.adjust_brightness,
        floats.adjust_contrast,
        floats.adjust_saturation,
        floats.adjust_hue,
    )

    def one(crop: Tensor, row: list[float]) -> Tensor:
        x = floats.to_dtype(crop.permute(2, 0, 1).contiguous(), torch.float32, scale=True)
        if row[ph.JITTER]:
            for column in ph.ORDERS[int(row[ph.ORDER])]:
                if row[column] != ph.NEUTRAL[column]:
                    x = jitter[column](x, row[column])
        if row[ph.GREY]:
            x = floats.rgb_to_grayscale(x, num_output_channels=3)
        if row[ph.BLUR_SIGMA]:
            x = floats.gaussian_blur(x, [SPEC.blur_kernel] * 2, [row[ph.BLUR_SIGMA]] * 2)
        if row[ph.SOLARIZE]:
            x = floats.solarize(x, SPEC.solarize_threshold / 255)
        return floats.normalize(x, list(SPEC.mean), list(SPEC.std))

    return _crop_by_crop(one, parts)


def torchvision_pillow(parts: list[Part]) -> list[Tensor]:
    jitter = (
        pillow.adjust_brightness,
        pillow.adjust_contrast,
        pillow.adjust_saturation,
        pillow.adjust_hue,
    )

    def one(crop: Tensor, row: list[float]) -> Tensor:
        x = Image.fromarray(crop.numpy())
        if row[ph.JITTER]:
            for column in ph.ORDERS[int(row[ph.ORDER])]:
                if row[column] != ph.NEUTRAL[column]:
                    x = jitter[column](x, row[column])
        if row[ph.GREY]:
            x = pillow.to_grayscale(x, 3)
        if row[ph.BLUR_SIGMA]:  # through a tensor and back, as torchvision does for Pillow images
            x = pillow.gaussian_blur(x, [SPEC.blur_kernel] * 2, [row[ph.BLUR_SIGMA]] * 2)
        if row[ph.SOLARIZE]:
            x = ImageOps.solarize(x, SPEC.solarize_threshold)
        return pillow.normalize(pillow.to_tensor(x), list(SPEC.mean), list(SPEC.std))

    return _crop_by_crop(one, parts)


def _crop_by_crop(one: Callable[[Tensor, list[float]], Tensor], parts: list[Part]) -> list[Tensor]:
    return [
        torch.stack([one(c, row) for c, row in zip(crops, params.tolist(), strict=True)])
        for crops, params in parts
    ]


def in_turn(roads: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """CPU milliseconds an image of each round, the roads one after the other in each."""
    spent: dict[str, list[float]] = {name: [] for name in roads}
    for number in range(rounds + 1):
        for name, road in roads.items():
            begin = time.process_time()
            road()
            if number:
                spent[name].append(1e3 * (time.process_time() - begin) / IMAGES)
    return spent


def on_the_cpu(parts: list[Part], compiled: bool) -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU, one thread, milliseconds an image (all ten crops)")
    print(f"{'':28}{'ours':>8}{'floats':>8}{'Pillow':>8}   floats/ours  Pillow/ours")
    for name in (None, *COLUMNS, "as drawn"):
        chosen = parts if name == "as drawn" else only(name, parts)
        roads = {
            "ours": partial(ours, chosen),
            "floats": partial(torchvision_floats, chosen),
            "Pillow": partial(torchvision_pillow, chosen),
        }
        spent = in_turn(roads, ROUNDS if name == "as drawn" else 3)
        middle = {road: statistics.median(values) for road, values in spent.items()}
        ratios = [
            sorted(a / b for a, b in zip(spent[road], spent["ours"], strict=True))
            for road in ("floats", "Pillow")
        ]
        print(
            f"{name or 'conversions alone':28}"
            + "".join(f"{middle[road]:8.2f}" for road in roads)
            + "".join(f"   {statistics.median(r):.1f} ({r[0]:.1f}-{r[-1]:.1f})" for r in ratios)
        )
    apart = [
        (a - b).abs() * torch.tensor(SPEC.std)[:, None, None] * 255
        for a, b in zip(ours(parts), torchvision_pillow(parts), strict=True)
    ]
    flat = torch.cat([x.flatten() for x in apart])
    most = flat.sort().values[int(0.999 * len(flat))]
    print(
        f"as drawn, from Pillow's 8-bit results: mean {flat.mean():.2f}, 99.9 % under {most:.1f}, "
        f"all under {flat.max():.0f} of 255"
    )
    if compiled:
        function = CompiledPhotometric()
        begin = time.perf_counter()
        roads = {"ours": lambda: ours(parts), "compiled": lambda: ours(parts, function)}
        roads["compiled"]()
        print(f"compiling: {time.perf_counter() - begin:.0f} s")
        spent = in_turn(roads)
        print("compiled", *(f"{n} {statistics.median(v):.2f} ms" for n, v in spent.items()))


def on_a_device(parts: list[Part], device: torch.device, images: int) -> None:
    """Eager and compiled colour, and a training step of ViT-S/14, for `images` images each."""
    times = -(-images // IMAGES)
    parts = [
        (crops.repeat(times, 1, 1, 1)[: images * n].to(device), p.repeat(times, 1)[: images * n])
        for (crops, p), n in zip(parts, (2, CROPS.local_crops), strict=True)
    ]
    compiled = CompiledPhotometric()
    roads = {
        "eager, in groups": lambda: ours(parts),
        "compiled": lambda: ours(parts, compiled),
        "step of ViT-S/14": training_step(device, images),
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {images} images, bfloat16 networks, milliseconds")
    spent: dict[str, list[float]] = {name: [] for name in roads}
    for number in range(ROUNDS + 3):
        for road, function in roads.items():
            _finish(device)
            begin = time.perf_counter()
            function()
            _finish(device)
            if number >= 3:
                spent[road].append(1e3 * (time.perf_counter() - begin))
    step = statistics.median(spent["step of ViT-S/14"])
    for road, values in spent.items():
        middle = statistics.median(values)
        print(f"{road:20}{middle:9.2f} ({min(values):.2f}-{max(values):.2f}) {middle / step:7.1%}")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def training_step(device: torch.device, images: int) -> Callable[[], object]:
    """A step of configs/vits14.yaml without its colour, blocks compiled as in training."""
    from pipeline.config.load import load
    from pipeline.model.groups import parameter_groups
    from pipeline.schedule import StepValues
    from pipeline.train import build
    from pipeline.train.parallel.blocks import compile_blocks
    from pipeline.train.step import train_step
    from pipeline.views.batch import Views

    config = load([str(Path(__file__).parents[1] / "configs/vits14.yaml")])
    pair = build.pair(config).to(device)
    if device.type == "cuda":
        for encoder in pair:
            compile_blocks(encoder.backbone)
    optimizer = torch.optim.AdamW(parameter_groups(pair.student))
    objective = build.objective(config, pair)
    values = StepValues(1e-4, 0.04, 0.99, 0.07, 1e-4)
    patches = (CROPS.global_size // config.model.patch_size) ** 2
    views = Views(
        torch.randn(2 * images, 3, CROPS.global_size, CROPS.global_size, device=device),
        torch.randn(
            CROPS.local_crops * images, 3, CROPS.local_size, CROPS.local_size, device=device
        ),
        torch.rand(2 * images, patches, device=device) < 0.15,
    )
    return lambda: train_step(
        pair.student,
        pair,
        [views],
        optimizer,
        values,
        objective,
        autocast_dtype=torch.bfloat16,
        generator=torch.Generator().manual_seed(0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compile", action="store_true", help="compiled code on the CPU as well")
    parser.add_argument("--images", type=int, default=64, help="images a step on a GPU")
    arguments = parser.parse_args()
    parts = work()
    on_the_cpu(parts, arguments.compile)
    if torch.cuda.is_available():
        on_a_device(parts, torch.device("cuda"), arguments.images)
    else:
        print("no GPU: eager, compiled and their share of a step of ViT-S/14 are not measured")


if __name__ == "__main__":
    main()
