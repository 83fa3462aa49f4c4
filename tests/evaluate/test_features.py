import numpy as np
import pytest
import torch
from torch import nn

from pipeline.evaluate.features import embed, inference, normalise

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Backbone(nn.Module):
    """Channel means through a linear layer; notes how it was called."""

    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.dropout = nn.Dropout(0.5)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        return self.dropout(self.linear(x.mean((2, 3))))


def images(*counts: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (n, 8, 8, 3), np.uint8) for n in counts]


def test_features_equal_the_module_called_by_hand():
    backbone, batches = Backbone(), images(3, 2)
    features = embed(backbone, batches, MEAN, STD)
    assert features.shape == (5, 5) and features.dtype == torch.float32
    for i, image in enumerate(np.concatenate(batches)):
        pixels = (image / 255 - MEAN) / STD
        expected = backbone.linear(torch.tensor(pixels.mean((0, 1)), dtype=torch.float32))
        torch.testing.assert_close(features[i], expected.detach(), atol=1e-5, rtol=1e-5)
    assert backbone.calls == [(False, False)] * 2 and not features.requires_grad


def test_every_module_gets_its_mode_back_even_after_an_error():
    backbone = Backbone().train()
    backbone.dropout.eval()
    embed(backbone, images(1), MEAN, STD)
    assert backbone.training and backbone.linear.training and not backbone.dropout.training
    with pytest.raises(ZeroDivisionError), inference(backbone, "cpu", torch.float32):
        assert not backbone.training
        raise ZeroDivisionError
    assert backbone.training and not backbone.dropout.training


def test_bfloat16_is_close_and_returned_as_float32():
    backbone, batches = Backbone(), images(4)
    full = embed(backbone, batches, MEAN, STD)
    half = embed(backbone, batches, MEAN, STD, dtype=torch.bfloat16)
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    torch.testing.assert_close(half, full, atol=2e-2, rtol=2e-2)


def test_no_images():
    assert embed(Backbone(), [], MEAN, STD).shape == (0, 5)


def test_normalise_equals_torchvision_and_leaves_read_only_images():
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    (batch,) = images(2)
    batch.flags.writeable = False
    ours = normalise(batch, MEAN, STD)
    theirs = torch.stack([functional.to_image(image) for image in batch.copy()])
    theirs = functional.normalize(functional.to_dtype(theirs, torch.float32, scale=True), MEAN, STD)
    torch.testing.assert_close(ours, theirs)
