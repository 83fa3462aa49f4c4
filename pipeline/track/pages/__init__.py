"""What the pages of MLflow show: which points of a curve, how charts stand, what a model says."""
