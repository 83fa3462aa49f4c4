"""What MLflow is told of a recipe and its results: the page of a pipeline's run, of a model."""
