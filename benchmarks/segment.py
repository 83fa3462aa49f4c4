"""Masks from one reference frame on CamVid: road, sky and building, without training.

    python benchmarks/segment.py [--weights FOLDER] [--data FOLDER] [--references N]

Each reference is one frame of the training part with its mask; all frames of the test part are
segmented by it. IoU of a class counts pixels over all test frames, void left out; the other eight
classes are one, `other`, which competes and is not averaged. mIoU is the mean of the three. The
references are spread evenly over the training frames that show all three; given are the mean over
them and the worst and best one.

What it is compared with:
* the same network at step 0, another draw of the same size;
* colour alone: the nearest mean colour of each class, by pixel, and a vote of the nearest patches
  by their mean colours;
* place alone: the mask of the reference as it is, pixel by pixel, for streets look alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.embed.embedders import embedder_of, open_embedder
from pipeline.evaluate.features import normalise
from pipeline.model.vit import BackboneSpec, VisionTransformer
from pipeline.use.network import fitted, patch_maps
from pipeline.use.segment import VOID, Reference, pixel_classes

DATA = Path(__file__).parents[2] / "shared" / "data" / "camvid"
CLASSES = {"road": 3, "sky": 0, "building": 1}
UNLABELLED = 11
SIDES = (120, 240)  # of the shorter side, pixels
K = 10

Mask = np.ndarray[Any, np.dtype[np.int64]]
Segment = Callable[[np.ndarray, Mask, np.ndarray], Mask]  # type: ignore[type-arg]


def frames(folder: Path) -> list[tuple[np.ndarray, Mask]]:  # type: ignore[type-arg]
    """Pixels and class numbers (other, road, sky, building, or VOID) of each frame."""
    numbers = np.zeros(256, np.int64)
    for number, one in enumerate(CLASSES.values(), 1):
        numbers[one] = number
    numbers[UNLABELLED] = VOID
    pairs = []
    for path in sorted((folder / "images").iterdir()):
        mask = np.asarray(Image.open(folder / "masks" / f"{path.stem}.png"))
        pairs.append((np.asarray(Image.open(path).convert("RGB")), numbers[mask]))
    return pairs


class Network:
    """Masks by a backbone; the patches of each frame are computed once."""

    def __init__(self, network: nn.Module, mean: Any, std: Any, side: int, method: str) -> None:
        self.network, self.mean, self.std = network, mean, std
        self.side, self.method = side, method
        self.maps: dict[int, Tensor] = {}

    def patches(self, pixels: Any) -> Tensor:
        """[h, w, D] of a frame."""
        if id(pixels) not in self.maps:
            prepared = fitted(pixels, self.side, int(self.network.patch_size))  # type: ignore[arg-type]
            x = normalise(prepared[None], self.mean, self.std)
            self.maps[id(pixels)] = patch_maps(self.network, x)[0]
        return self.maps[id(pixels)]

    def __call__(self, reference: Any, mask: Mask, target: Any) -> Mask:
        """The mask of a target frame."""
        known = Reference.of([self.patches(reference)], [torch.from_numpy(mask)])
        scores = known.scores(self.patches(target)[None], self.method, K)  # type: ignore[arg-type]
        return pixel_classes(scores, target.shape[:2])[0].numpy()


def by_mean_colour(reference: Any, mask: Mask, target: Any) -> Mask:
    """The class whose mean colour is nearest, for each pixel."""
    means = np.stack([reference[mask == one].mean(0) for one in range(1 + len(CLASSES))])
    return ((target[:, :, None] - means) ** 2).sum(-1).argmin(-1)


def by_near_colours(reference: Any, mask: Mask, target: Any, side: int = 8) -> Mask:
    """A vote of the K patches of 8 x 8 pixels whose mean colours are nearest."""

    def patches(pixels: Any) -> Tensor:
        x = torch.tensor(pixels).permute(2, 0, 1)[None].float()
        return F.avg_pool2d(x, side)[0].permute(1, 2, 0)

    known, asked = patches(reference), patches(target)
    shares = torch.stack(
        [
            F.avg_pool2d(torch.tensor(mask == one)[None].float(), side)[0]
            for one in range(1 + len(CLASSES))
        ],
        -1,
    )
    near = torch.cdist(asked.flatten(0, 1), known.flatten(0, 1)).topk(K, largest=False).indices
    votes = shares.flatten(0, 1)[near].mean(1).view(1, *asked.shape[:2], -1)
    return pixel_classes(votes, target.shape[:2])[0].numpy()


def by_place(reference: Any, mask: Mask, target: Any) -> Mask:
    """The reference's own mask; its void is `other`."""
    return np.where(mask == VOID, 0, mask)


def ious(
    segment: Segment, reference: tuple[Any, Mask], targets: list[tuple[Any, Mask]]
) -> list[float]:
    """IoU of each class over all targets."""
    both, either = np.zeros(len(CLASSES)), np.zeros(len(CLASSES))
    for pixels, truth in targets:
        made = segment(*reference, pixels)
        known = truth != VOID
        for one in range(len(CLASSES)):
            ours, theirs = (made == one + 1) & known, truth == one + 1
            both[one] += (ours & theirs).sum()
            either[one] += (ours | theirs).sum()
    return (both / either).tolist()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path("runs/demo/weights/dinov2"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--references", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    embedder = open_embedder(embedder_of(str(arguments.weights)))
    sizes = json.loads((arguments.weights / "config.json").read_text())
    del sizes["format"]
    fresh = VisionTransformer(BackboneSpec(**sizes))
    known = [
        pair
        for pair in frames(arguments.data / "train")
        if set(range(4)) <= set(np.unique(pair[1]))
    ]
    spread = (2 * np.arange(arguments.references) + 1) * len(known) // (2 * arguments.references)
    references = [known[at] for at in spread]
    targets = frames(arguments.data / "test")
    methods: dict[str, Segment] = {}
    for side in SIDES:
        for name, network in (("trained", embedder.network), ("step 0", fresh)):
            for method in ("mean", "nearest"):
                run = Network(network, embedder.mean, embedder.std, side, method)
                methods[f"{name}, {side} px, {method}"] = run
    methods["colour, mean"] = by_mean_colour
    methods["colour, nearest"] = by_near_colours
    methods["place"] = by_place
    print(f"{len(references)} references alone, {len(targets)} frames")
    print("| | mIoU | worst to best reference | " + " | ".join(CLASSES) + " | s |")
    for name, segment in methods.items():
        began = time.process_time()
        scores = np.array([ious(segment, one, targets) for one in references])
        means = scores.mean(1)
        row = [f"{means.mean():.3f}", f"{means.min():.3f} to {means.max():.3f}"]
        row += [f"{one:.3f}" for one in scores.mean(0)]
        print(
            f"| {name} | " + " | ".join(row) + f" | {time.process_time() - began:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
