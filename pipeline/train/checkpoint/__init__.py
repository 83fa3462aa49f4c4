"""Checkpoints of a run: written whole or not at all, and read by any number of workers.

Start at `state.py`. In: the tensors of a `TrainState`. Out: folders `checkpoints/step-…`.
Imports: errors, storage, train.parallel, uri.
"""
