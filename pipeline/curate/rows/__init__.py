"""Tables of a curation: what each holds, read and written piece by piece. Start at `tables.py`.

In: parquet files. Out: rows in portions that fit a task; exact similarities; draws by id.
Imports: steps, images, shards, storage, views, errors, uri.
"""
