"""The process that a user starts: Ray joined or started, messages, signals. Start at `cluster.py`.

In: `resources` of a recipe. Out: a connected Ray, and an end that closes what is open.
Imports: plan (what fits where), environment, heartbeat, errors. What is private of Ray is in
`ray_internals.py` and `data_internals.py` alone.
"""
