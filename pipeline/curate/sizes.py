"""Whether the clusterings that a recipe asks for fit into tasks, told before any image is read."""

from __future__ import annotations

from pipeline.config.config import Config
from pipeline.curate.choose.lloyd import TASK_ELEMENTS
from pipeline.curate.choose.seed_clusters import CLUSTER, CLUSTER_ROWS, Retrieval
from pipeline.curate.images.descriptor import DIM
from pipeline.curate.models import embedder_of
from pipeline.curate.sets import Sets
from pipeline.embed.embedders import DESCRIPTOR, Embedder
from pipeline.errors import ConfigError
from pipeline.uri import public

WIDEST = 8192  # no vectors are wider; so few clusters always fit


def check_clusters(config: Config, sets: Sets) -> None:
    """Refuses more clusters than a task can hold.

    Vectors have the width of their model, so a model is opened here, but only where clusters are so
    many that it matters.

    Raises:
        ConfigError: too many clusters.
        PipelineError: the model cannot be opened.
    """
    rows, asked = sets.pool.rows, {}
    retrieval = Retrieval(**config.retrieve.model_dump(exclude={"seeds", "include"}))
    if any(retrieval.mode_of(seeds.rows) == CLUSTER for seeds in sets.seeds.values()):
        asked["retrieve.clusters"] = retrieval.clusters or max(1, rows // CLUSTER_ROWS)
    if config.balance.images and config.balance.levels:
        asked["balance.levels"] = config.balance.levels[0]
    counts = {field: min(count, rows) for field, count in asked.items()}
    if max(counts.values(), default=0) * WIDEST <= TASK_ELEMENTS:
        return
    spec = embedder_of(config, "curate.embedder", config.curate.embedder)
    width = DIM if spec.kind == DESCRIPTOR else Embedder(spec).dim
    for field, count in counts.items():
        if count * width > TASK_ELEMENTS:
            most = TASK_ELEMENTS // width
            raise ConfigError(
                f"{field}: {count:,} clusters of vectors of {width:,} numbers "
                f"(curate.embedder={public(config.curate.embedder)}) do not fit into a task of "
                f"2 GB: {most:,} do",
                f"set {field} to at most {most} "
                "(smaller clusters take more of them), or use an embedder with narrower vectors",
            )
