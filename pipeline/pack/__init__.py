"""Any pile of images to shards that are ordered by a hash of their bytes. Start at `pack.py`.

In: folders, archives, parquet, lists. Out: shards and a manifest; bad files listed with reasons.
Imports: images, shards, storage, errors, uri.
"""
