"""Tasks that write tables, keyed by what they are given: a rerun goes on. Start at `steps.py`.

In: a function, its items, and what all of them are given. Out: a `Step`, which later steps read.
`steps.py` has the nouns and the keys; `tasks.py` runs tasks on Ray.
Imports: rows, storage, heartbeat, errors, uri.
"""
