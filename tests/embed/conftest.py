"""Small models and sets, and embedding in this process instead of Ray's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.embed.embedders import EmbedderSpec, embedder_of
from pipeline.embed.run import Request
from pipeline.model.pair import BackboneSpec
from pipeline.model.vit import VisionTransformer
from pipeline.model.weights import save_backbone
from pipeline.shards.shards import open_shards
from tests.curate.images import scene, shard
from tests.data import encoded
from tests.standins import embedding_here

SPEC = BackboneSpec(image_size=28, patch_size=7, width=32, depth=4, heads=2, registers=2)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IMAGES = [encoded(scene(n, 40 + n, 50)) for n in range(11)]


@pytest.fixture(scope="session")
def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    network = SPEC.build().eval()
    with torch.no_grad():  # LayerScale of 1e-5 would hide what blocks do
        for name, value in network.named_parameters():
            if "gamma" in name:
                value.fill_(0.7)
    return network


@pytest.fixture(scope="session")
def weights(backbone: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(backbone, SPEC, tmp_path_factory.mktemp("weights") / "w")


@pytest.fixture
def spec(weights: Path) -> EmbedderSpec:
    return embedder_of(str(weights), batch_size=4, mean=MEAN, std=STD)


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    """Two files, 11 good images and 2 bad ones, in row groups of three."""
    shard(tmp_path / "pile" / "a.parquet", [*IMAGES[:6], b"broken", b""], group=3)
    shard(tmp_path / "pile" / "b.parquet", IMAGES[6:], group=3)
    return tmp_path / "pile"


@pytest.fixture
def request_(spec: EmbedderSpec, pile: Path) -> Request:
    return Request(spec, open_shards(str(pile)), outputs=("cls", "mean", "patches", "blocks"))


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Embeds in this process; collects the numbers of the units that were embedded."""
    yield embedding_here(monkeypatch)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many images a unit has."""

    def small(images: int) -> None:
        monkeypatch.setattr("pipeline.embed.units.UNIT_IMAGES", images)

    return small
