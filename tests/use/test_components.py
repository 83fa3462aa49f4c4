"""Components: against numpy's SVD, and planted parts that keep their colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.use.components import Components, components

BACK, HEAD, BODY = 0, 1, 2


def planted(layouts: Tensor, noise: float = 0.05, width: int = 16, seed: int = 0) -> Tensor:
    """Patches of three parts: `[B, h, w]` numbers of parts to `[B, h, w, width]`."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    object_, head = base[0], base[1]
    parts = torch.stack([-4 * object_, 4 * object_ + head, 4 * object_ - head])
    return parts[layouts] + noise * torch.randn(*layouts.shape, width, generator=generator)


def layouts() -> Tensor:
    first = torch.zeros(8, 8, dtype=torch.long)
    first[2:4, 3:6], first[4:7, 2:6] = HEAD, BODY
    second = torch.zeros(8, 8, dtype=torch.long)
    second[3:5, 1:3], second[3:7, 3:7] = HEAD, BODY
    return torch.stack([first, second])


def test_both_analyses_are_those_of_svd() -> None:
    patches = planted(layouts(), noise=0.3)
    tokens = patches.flatten(0, 2).double().numpy()
    centred = tokens - tokens.mean(0)
    first = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
    inside = layouts().flatten().numpy() > 0
    if first[~inside].mean() > 0:
        first = -first
    kept = tokens[first > 0]
    axes = np.linalg.svd(kept - kept.mean(0), full_matrices=False)[2][:3]
    expected = (tokens - kept.mean(0)) @ axes.T
    scores, foreground = components(patches)
    assert scores.shape == (2, 8, 8, 3)
    assert np.array_equal(foreground.flatten().numpy(), first > 0)
    for axis in range(3):  # up to the sign
        ours, theirs = scores[..., axis].flatten().numpy(), expected[:, axis]
        assert min(np.abs(ours - theirs).max(), np.abs(ours + theirs).max()) < 1e-4
    fitted = Components.fit(patches)
    variances = np.linalg.svd(kept - kept.mean(0), full_matrices=False)[1] ** 2
    np.testing.assert_allclose(fitted.share, (variances / variances.sum())[:3], rtol=1e-6)


def test_the_object_is_what_is_not_at_the_border() -> None:
    for sign in (1, -1):  # whichever way the patches point
        foreground = components(sign * planted(layouts()))[1]
        assert torch.equal(foreground, layouts() > 0)


def test_a_part_has_one_colour_in_all_images() -> None:
    patches, where = planted(layouts()), layouts()
    colours = Components.fit(patches).colours(patches)
    assert (colours[where == BACK] == 0).all()
    for part in (HEAD, BODY):
        each = [colours[i][where[i] == part] for i in range(2)]
        assert (each[0].mean(0) - each[1].mean(0))[0].abs() < 0.05
    between = colours[where == HEAD].mean(0) - colours[where == BODY].mean(0)
    assert between[0].abs() > 0.8  # red tells head from body


def test_colours_do_not_depend_on_the_order_of_images_and_reach_others() -> None:
    patches = planted(layouts())
    forward, backward = Components.fit(patches), Components.fit(patches.flip(0))
    torch.testing.assert_close(
        forward.colours(patches), backward.colours(patches), rtol=0, atol=1e-5
    )
    other = planted(layouts().flip(2), seed=0)
    shown = forward.colours(other)
    assert torch.equal((shown.sum(-1) > 0), forward.foreground(other))


def test_sizes_may_differ() -> None:
    patches = planted(layouts())
    wide = torch.cat([patches[0], patches[1]], 1)
    fitted = Components.fit([patches[0], wide])
    assert fitted.colours(wide).shape == (8, 16, 3)


def test_an_empty_picture_and_few_components() -> None:
    flat = torch.ones(1, 4, 4, 8)
    fitted = Components.fit(flat)
    assert torch.isfinite(fitted.colours(flat)).all()
    assert Components.fit(planted(layouts()), 1).colours(planted(layouts())).shape == (2, 8, 8, 3)
    one = components(torch.randn(1, 1, 1, 8))
    assert one[0].shape == (1, 1, 1, 3)


@pytest.mark.parametrize(
    ("maps", "n"), [(torch.zeros(0, 4, 4, 8), 3), (torch.zeros(1, 4, 4, 8), 9)]
)
def test_sentences(maps: Tensor, n: int) -> None:
    with pytest.raises(PipelineError, match=f"{n} components of"):
        components(maps, n)
