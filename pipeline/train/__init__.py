"""The step, the loop around it, checkpoints, and the driver of a training run."""
