"""Pack, curate, pretrain, evaluate, export: one after the other. Start at `chain.py`.

In: a config. Out: files of the run folder and MLflow runs. Each stage is an adapter to its room.
Imports: all rooms.
"""

from pipeline.stages.chain import ORDER, run

__all__ = ["ORDER", "run"]
