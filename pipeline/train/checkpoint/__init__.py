"""Checkpoints of a run: written whole or not at all, and read by any number of workers.

Start at `state.py`; `saving.py` writes them beside the steps, `restore.py` gives them to a group.
In: the tensors of a `TrainState`, whole or in slices. Out: folders `checkpoints/step-…`.
Imports: errors, storage, uri.
"""
