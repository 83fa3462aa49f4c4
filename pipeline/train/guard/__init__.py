"""The guard: compares each evaluation with the start's, and ends a training that makes it worse.

`decision.py` compares and counts, `memory.py` keeps the start's answers beside the checkpoints,
`words.py` says it, `guard.py` is what rank 0 holds, `begin.py` makes it. The first three need
neither torch nor Ray.
"""
