"""The stages as a user runs them: config in, files and MLflow runs out. `jobs/` call `run`."""

from pipeline.stages.chain import ORDER, run

__all__ = ["ORDER", "run"]
