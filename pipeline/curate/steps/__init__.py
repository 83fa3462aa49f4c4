"""Tasks that write files, each with an account, so that a rerun goes on. Start at `steps.py`.

In: a name, a key, tasks. Out: a `Result`: the folder, and what each task counted.
Imports: storage, heartbeat, errors, uri.
"""
