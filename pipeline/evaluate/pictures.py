"""Pictures of a run: square uint8 grids [H, H, 3].

Images of three channels are shown as they are; one or two channels as the grey of the first, four
and more as the colours of the first three.

Shapes: n images, S side in pixels, C channels, P patches = grid height x grid width, D width.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.evaluate.features import inference, normalise
from pipeline.views.batch import Batch
from pipeline.views.crops import GLOBAL_CROPS
from pipeline.views.photometric import PhotometricSpec

Images = npt.NDArray[np.uint8]

CELL = 112  # side of a tile, pixels
GAP = 4  # white between tiles, pixels
BORDER = 5  # of a neighbour's frame, pixels
# Hues that stay apart for colour-blind eyes (Okabe and Ito 2008).
RIGHT = (0, 158, 115)
WRONG = (213, 94, 0)
HIDDEN = (92, 46, 190)  # violet, rare in photos
HIDDEN_OPACITY = 0.75  # what is hidden can still be guessed by the reader
CAPTIONS = {  # by the picture's name; printed above it
    "crops": "What the student sees: a row for each image, two global crops and two local ones. "
    "Violet patches are hidden from it.",
    "neighbours": "A row for each query, which stands first; then its nearest images, best first. "
    "Green frame: same class. Orange frame: another class.",
    "patch_pca": "Images beside their first three principal components as colours: parts of one "
    "colour are alike to the network.",
}


def crops_sheet(batch: Batch, spec: PhotometricSpec, grid: tuple[int, int]) -> Images:
    """Four images of a batch as the student sees them: two global crops, then two local ones, a
    row.

    Colour is applied; patches hidden by the mask are violet.

    Args:
        batch: its first images are shown, without those that could not be decoded.
        spec: the one the batch's parameters were drawn with.
        grid: patches of a global crop, (rows, columns).
    """
    columns = GLOBAL_CROPS + min(2, batch.local_crops.shape[1])
    shown = batch.without_fillers().take(0, columns).to("cpu")
    views = shown.views(spec)
    hidden = views.masks.view(-1, 1, *grid)
    global_tiles = _shade(_tiles(_colours(views.global_views, spec)), hidden)
    local_tiles = _tiles(_colours(views.local_views, spec))
    crops = GLOBAL_CROPS + batch.local_crops.shape[1]
    tiles = torch.cat((global_tiles, local_tiles)).reshape(crops, shown.images, 3, CELL, CELL)
    rows = tiles[:columns].transpose(0, 1)  # crop-major to a row for each image
    return _square(rows.flatten(0, 1), columns)


def pca_grid(
    backbone: nn.Module, images: Images, mean: Sequence[float], std: Sequence[float]
) -> Images | None:
    """Images beside the first three principal components of their patch tokens, as colours; None
    for a backbone that gives no tokens.

    Args:
        backbone: with `forward_features` as a VisionTransformer has it; its mode is as before
            afterwards.
        images: uint8 [n, S, S, C], S a multiple of the patch size. Eight fill the square.
        mean: of each channel.
        std: of each channel.
    """
    device = next(backbone.parameters()).device
    with inference(backbone, device, torch.float32):
        features = backbone.forward_features(normalise(images, mean, std, device))  # type: ignore[operator]
    tokens = features["x_norm_patchtokens"]
    if tokens is None:
        return None
    side = math.isqrt(tokens.shape[1])
    return pca_picture(images, tokens.float().cpu(), (side, side))


def pca_picture(images: Images, tokens: Tensor, grid: tuple[int, int]) -> Images:
    """`pca_grid` from tokens that are there already.

    Args:
        images: uint8 [n, S, S, C].
        tokens: [n, P, D] patch tokens.
        grid: (rows, columns) of the patches.
    """
    colours = token_colours(tokens).reshape(len(tokens), *grid, 3).permute(0, 3, 1, 2)
    maps = functional.interpolate(colours, size=(CELL, CELL), mode="nearest")
    pictures = _tiles(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255)
    pairs = torch.stack((pictures, maps), 1).flatten(0, 1)
    columns = math.ceil(math.sqrt(len(pairs)))
    return _square(pairs, columns + columns % 2)  # an even number keeps pairs side by side


def token_colours(tokens: Tensor) -> Tensor:
    """First three principal components of all tokens together, as colours in [0, 1].

    The sign of a component is that of its largest loading, so that the same tokens always give the
    same colours; each is scaled from its 2nd to its 98th percentile.

    Args:
        tokens: [n, P, D].

    Returns:
        float32 [n, P, 3]; mid-grey in components that do not vary.
    """
    flat = tokens.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    scores = flat @ principal_directions(flat, 3)[0]
    scores = functional.pad(scores, (0, 3 - scores.shape[1]))
    low, high = scores.quantile(scores.new_tensor((0.02, 0.98)), dim=0)
    varies = high - low > 1e-9 * flat.abs().amax().clamp(min=1e-30)
    scaled = (scores - low) / torch.where(varies, high - low, 1.0)
    return torch.where(varies, scaled, 0.5).clamp(0, 1).float().view(*tokens.shape[:2], 3)


def principal_directions(centred: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n strongest directions `[D, n]` of centred tokens `[T, D]`, each with the sign of its
    largest loading, and all D variances times T, strongest first.
    """
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    directions = vectors.flip(1)[:, :n]
    strongest = directions.abs().argmax(0, keepdim=True)
    return directions * directions.gather(0, strongest).sign(), values.flip(0).clamp(min=0)


def neighbours_grid(
    queries: Images, neighbours: Images, correct: npt.NDArray[np.bool_] | None = None
) -> Images:
    """A row for each query: the query, then its nearest images, best first.

    Args:
        queries: uint8 [n, S, S, C]; k + 1 of them fill the square.
        neighbours: uint8 [n, k, S, S, C].
        correct: bool [n, k], whether labels agree: green-blue frames where true, orange where not.
    """
    count, k = neighbours.shape[:2]
    stacked = np.concatenate((queries[:, None], neighbours), 1).reshape(-1, *queries.shape[1:])
    tiles = _tiles(torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255)
    rows = tiles.reshape(count, k + 1, 3, CELL, CELL)
    if correct is not None:
        right = torch.from_numpy(np.array(correct)).reshape(count, k, 1)
        colours = torch.where(right, torch.tensor(RIGHT), torch.tensor(WRONG)) / 255
        frame = torch.ones(CELL, CELL, dtype=torch.bool)
        frame[BORDER:-BORDER, BORDER:-BORDER] = False
        rows[:, 1:] = torch.where(frame, colours[..., None, None], rows[:, 1:])
    blank = torch.ones(count, max(0, count - k - 1), 3, CELL, CELL)  # keeps a query to a row
    rows = torch.cat((rows, blank), 1)
    return _square(rows.flatten(0, 1), rows.shape[1])


def _colours(views: Tensor, spec: PhotometricSpec) -> Tensor:
    """Normalised views to values in [0, 1]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    return (views * std + mean).clamp(0, 1)


def _tiles(x: Tensor) -> Tensor:
    """[n, C, H, W] in [0, 1] to tiles [n, 3, CELL, CELL]."""
    if not len(x):
        return x.new_zeros(0, 3, CELL, CELL)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    resized = functional.interpolate(x, size=(CELL, CELL), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)


def _shade(tiles: Tensor, hidden: Tensor) -> Tensor:
    """Cover what a mask [n, 1, rows, columns] hides."""
    cover = functional.interpolate(hidden.float(), size=tiles.shape[2:], mode="nearest")
    violet = torch.tensor(HIDDEN)[:, None, None] / 255
    return tiles + cover * HIDDEN_OPACITY * (violet - tiles)


def _square(tiles: Tensor, columns: int) -> Images:
    """Tiles [n, 3, CELL, CELL], row by row, on a white square of columns x columns tiles."""
    side = columns * CELL + (columns - 1) * GAP
    sheet = torch.ones(side, side, 3)
    for i, tile in enumerate(tiles):
        top, left = (CELL + GAP) * (i // columns), (CELL + GAP) * (i % columns)
        sheet[top : top + CELL, left : left + CELL] = tile.permute(1, 2, 0)
    picture: Images = sheet.mul(255).round().to(torch.uint8).numpy()
    return picture
