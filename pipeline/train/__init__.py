"""The step, the loop around it, checkpoints, and the driver of a training run. Start at `loop.py`.

In: a `Plan` and shards. Out: checkpoints, metrics, pictures. `run.py` is the driver's side.
Imports: all rooms below; track in functions.
"""
