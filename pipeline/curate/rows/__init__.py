"""Tables of a curation: what each holds, read and written piece by piece. Start at `tables.py`.

In: parquet files. Out: rows in portions that fit a task (`read_rows.py`), buckets of a shuffle
(`bucketed.py`), exact similarities (`exact.py`), the first of each group (`first_of_each.py`),
draws by id (`draws_by_id.py`).
Imports: images, shards, storage, views, errors, uri.
"""
