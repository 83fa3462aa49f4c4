"""What is looked at before a run. Start at `doctor.py` (machine, shards, and
by `gpus.py` GPU nodes) or `dry_run.py` (a job).

Both need no Ray, unless RAY_ADDRESS names a cluster.
In: a config. Out: aligned lines on the console, or the error that the run would meet.
Imports: stages and what they import.
"""
