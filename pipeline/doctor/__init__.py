"""What is looked at before a run: this machine and the shards (`doctor.py`), and all that a job
would do, without doing it (`dry_run.py`). Both need no Ray, unless RAY_ADDRESS names a cluster.

In: a config. Out: aligned lines on the console, or the error that the run would meet.
Imports: stages and what they import.
"""
