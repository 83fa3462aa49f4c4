import numpy as np
import pytest
import torch
from torch import nn

from pipeline.evaluate import pictures
from pipeline.evaluate.pictures import CELL, GAP, crops_sheet, neighbours_grid, pca_grid
from pipeline.views import photometric as ph
from pipeline.views.batch import Batch

SPEC = ph.PhotometricSpec()
STRIDE = CELL + GAP


def batch(images: int = 5, local_crops: int = 3) -> Batch:
    """Crop i of image j has the grey 20 + 10 i + 40 j; jitter is off; one masked corner patch."""
    value = 20 + 10 * np.arange(2 + local_crops)[None] + 40 * np.arange(images)[:, None]
    filled = value.astype(np.uint8)[:, :, None, None, None]
    masks = np.zeros((images, 2, 16), bool)
    masks[:, 1, 3] = True  # top right patch of the second global crop
    params = np.zeros((images, 2 + local_crops, ph.PARAMS), np.float32)
    return Batch.from_chunk(
        {
            "image_ids": np.zeros((images, 16), np.uint8),
            "global_crops": np.broadcast_to(filled[:, :2], (images, 2, 28, 28, 3)).copy(),
            "local_crops": np.broadcast_to(filled[:, 2:], (images, local_crops, 14, 14, 3)).copy(),
            "photometric": params,
            "masks": masks,
            "labels": np.zeros(images, np.int64),
            "valid": np.ones(images, bool),
        }
    )


def cell(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    top, left = row * STRIDE, column * STRIDE
    return picture[top : top + CELL, left : left + CELL]


def test_crops_sheet_has_an_image_a_row_and_a_crop_a_column():
    sheet = crops_sheet(batch(), SPEC, (4, 4))
    assert sheet.shape == (4 * CELL + 3 * GAP,) * 2 + (3,) and sheet.dtype == np.uint8
    for row in range(4):
        for column in range(4):
            corner = cell(sheet, row, column)[-1, 0]
            assert abs(corner.astype(int) - (20 + 10 * column + 40 * row)).max() <= 1
    assert (sheet[CELL : CELL + GAP] == 255).all()


def test_masked_patches_are_covered_and_no_others():
    sheet = crops_sheet(batch(), SPEC, (4, 4))
    for row in range(4):
        changed = (cell(sheet, row, 1).astype(int) - cell(sheet, row, 1)[-1, 0]) != 0
        expected = np.zeros((CELL, CELL), bool)
        expected[: CELL // 4, -CELL // 4 :] = True
        np.testing.assert_array_equal(changed.any(-1), expected)
        assert np.ptp(cell(sheet, row, 0)) == 0


def test_crops_sheet_shows_the_colours_of_the_student():
    data = batch()
    data.photometric[0, 0, ph.SOLARIZE] = data.photometric[3, 0, ph.SOLARIZE] = 1
    sheet = crops_sheet(data, SPEC, (4, 4))
    assert abs(int(cell(sheet, 3, 0)[-1, 0, 0]) - (255 - 140)) <= 1  # 20 + 40 * 3, inverted
    assert abs(int(cell(sheet, 0, 0)[-1, 0, 0]) - 20) <= 1  # below the threshold


@pytest.mark.parametrize(("images", "local_crops", "columns"), [(1, 8, 4), (3, 1, 3), (9, 0, 2)])
def test_crops_sheet_stays_square(images, local_crops, columns):
    sheet = crops_sheet(batch(images, local_crops), SPEC, (4, 4))
    assert sheet.shape[0] == sheet.shape[1] == columns * STRIDE - GAP
    assert (cell(sheet, columns - 1, 0) == 255).all() == (images < columns)


def test_token_colours_are_the_principal_components_of_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.2])
    tokens = torch.randn(4, 30, 6, generator=generator) * scale
    colours = pictures.token_colours(tokens).reshape(-1, 3)
    scores = decomposition.PCA(3).fit_transform(tokens.reshape(-1, 6).double().numpy())
    for component in range(3):
        inside = ((colours[:, component] > 0) & (colours[:, component] < 1)).numpy()
        assert inside.mean() > 0.9
        pair = np.corrcoef(colours[inside, component].numpy(), scores[inside, component])
        assert abs(pair[0, 1]) > 1 - 1e-6
    assert colours.min() == 0 and colours.max() == 1


def test_token_colours_do_not_depend_on_the_order_of_the_images():
    tokens = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(1))
    colours = pictures.token_colours(tokens)
    torch.testing.assert_close(pictures.token_colours(tokens.flip(0)), colours.flip(0))
    torch.testing.assert_close(pictures.token_colours(tokens * 3 + 2), colours)


def test_token_colours_without_variation():
    assert (pictures.token_colours(torch.ones(2, 9, 5)) == 0.5).all()
    line = torch.arange(18.0).view(2, 9, 1)
    colours = pictures.token_colours(line)  # narrower than three components
    assert (colours[..., 1:] == 0.5).all() and colours[0, 0, 0] == 0 and colours[1, 8, 0] == 1


class Backbone(nn.Module):
    """Patch tokens are the mean colours of the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward_features(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        assert not self.training and not torch.is_grad_enabled()
        patches = nn.functional.avg_pool2d(x, 7) * self.scale
        return {"x_norm_patchtokens": patches.flatten(2).transpose(1, 2)}


@pytest.mark.parametrize(("images", "columns"), [(8, 4), (1, 2), (3, 4), (9, 6)])
def test_pca_grid_is_square_with_pairs_side_by_side(images, columns):
    rng = np.random.default_rng(0)
    halves = np.zeros((images, 28, 28, 3), np.uint8)
    halves[:, :, 14:] = 200  # right half bright
    halves += rng.integers(0, 9, halves.shape, np.uint8)
    backbone = Backbone().train()
    picture = pca_grid(backbone, halves, SPEC.mean, SPEC.std)
    assert picture.shape == (columns * STRIDE - GAP,) * 2 + (3,) and backbone.training
    for i in range(images):
        row, column = divmod(2 * i, columns)
        assert cell(picture, row, column)[:, -1].mean() > 190
        colours = cell(picture, row, column + 1)
        assert np.ptp(colours[: CELL // 4, : CELL // 4].reshape(-1, 3), 0).max() == 0  # one patch
        halves_differ = abs(colours[:, 0, 0].mean() - colours[:, -1, 0].mean())
        assert halves_differ > 200


def test_neighbours_grid_frames_right_and_wrong():
    rng = np.random.default_rng(0)
    queries = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    neighbours = rng.integers(0, 256, (4, 3, 32, 32, 3), np.uint8)
    correct = rng.random((4, 3)) < 0.5
    picture = neighbours_grid(queries, neighbours, correct)
    assert picture.shape == (4 * STRIDE - GAP,) * 2 + (3,)
    plain = neighbours_grid(queries, neighbours)
    inner = slice(pictures.BORDER, -pictures.BORDER)
    for row in range(4):
        np.testing.assert_array_equal(cell(picture, row, 0), cell(plain, row, 0))
        for column in range(3):
            tile, untouched = (cell(p, row, column + 1) for p in (picture, plain))
            expected = pictures.RIGHT if correct[row, column] else pictures.WRONG
            assert tuple(tile[0, 50]) == tuple(tile[60, -1]) == expected
            np.testing.assert_array_equal(tile[inner, inner], untouched[inner, inner])


@pytest.mark.parametrize(("count", "k", "columns"), [(2, 3, 4), (5, 2, 5)])
def test_neighbours_grid_stays_square(count, k, columns):
    queries = np.zeros((count, 16, 16, 3), np.uint8)
    picture = neighbours_grid(queries, np.zeros((count, k, 16, 16, 3), np.uint8))
    assert picture.shape == (columns * STRIDE - GAP,) * 2 + (3,)
    assert (cell(picture, 1, k) == 0).all()
    assert (cell(picture, columns - 1, columns - 1) == 255).all()
