"""What to keep of what is left: a balanced sample, images like seeds. Start at `balance.py`.

In: vectors of the rows that are left. Out: rows that are chosen.
Imports: rows, steps, storage, errors, uri.
"""
