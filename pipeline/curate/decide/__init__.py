"""One decision for each image, and the shards of what is kept. Start at `decide.py`.

In: what the other rooms have found out. Out: decisions with reasons, counts, curated shards.
Imports: rows, steps, images, pack, shards, storage, errors, uri.
"""
