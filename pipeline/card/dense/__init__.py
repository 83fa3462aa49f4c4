"""Dense scores of models: segmentation and depth. Start at `results.py`.

In: an `EmbedderSpec` and a `DenseSet`. Out: a `Result` for each score. `opening.py` finds and
checks images with their masks or depth, `sets.py` reads them, `split.py` says which are scored,
`scores.py` puts the maths of `pipeline/evaluate/dense/` together.
"""

from pipeline.card.dense.opening import open_dense_set
from pipeline.card.dense.results import dense_baselines, dense_results
from pipeline.card.dense.sets import DenseSet
from pipeline.card.dense.split import DenseSettings

__all__ = ["DenseSet", "DenseSettings", "dense_baselines", "dense_results", "open_dense_set"]
