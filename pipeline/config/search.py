"""What is like an image: nearest neighbours among embedded images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.section import Positive, Section


class Search(Section):
    """Nearest neighbours among vectors that `embed` wrote."""

    enabled: bool = Field(
        False, description="in a whole chain: a page of neighbours of some images of the set"
    )
    vectors: str = Field(
        "", description="folder of vectors, or a run that has them; default: those of this run"
    )
    query: str = Field(
        "",
        description="an image file, an id or its beginning, a folder, parquet of images or "
        "vectors; several with commas between them",
    )
    k: int = Field(20, gt=0, le=10_000, description="neighbours of each image")
    min_similarity: float = Field(
        -1.0, ge=-1, le=1, description="neighbours below this cosine are left out"
    )
    vectors_column: Literal["cls", "mean"] = Field(
        "cls", description="which vectors: the CLS token, or the mean of the patches"
    )
    index: Literal["auto", "exact", "ivf"] = Field(
        "auto", description="exact, or an index (ivf); auto: an index above a million vectors"
    )
    memory_gib: float = Field(
        4.0, gt=0, description="exact search keeps vectors in memory up to this size"
    )
    model: str = Field(
        "", description="where the vectors' model is by now; default: where they say it was"
    )
    decisions: str = Field(
        "", description="curated run whose decisions are shown; default: the vectors' own run"
    )
    images: Positive = Field(
        8, le=100, description="in a whole chain: images of the set whose neighbours are shown"
    )
