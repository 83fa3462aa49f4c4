"""Steps: tasks that write tables, keyed by what they are given, so that a rerun goes on.

In: a function, its items, and what all of them are given. Out: a `Step`, which later steps read.
`steps.py` has the nouns and the keys, and is where to start; `tasks.py` runs tasks on Ray.
Imports: rows, storage, heartbeat, errors, uri.
"""
