"""What a dry run says of the vectors of a run that has not begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.stages.embed import expected
from pipeline.storage.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("recipe", "width"), [("small", 256), ("demo", 256), ("vits14", 384)])
def test_the_width_is_that_of_the_encoder(recipe: str, width: int, tmp_path: Path) -> None:
    config = load([str(ROOT / "configs" / f"{recipe}.yaml"), "embed.enabled=true"])
    folder = RunFolder.of(str(tmp_path), "new")
    assert expected(config, folder, training=True)[:2] == ("the teacher of this run", width)
