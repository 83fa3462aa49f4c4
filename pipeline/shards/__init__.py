"""What a set of image shards is, and how it is read. Start at `shards.py`.

In: a place. Out: a `ShardSet`: files, rows, columns, classes, the range of its values.
Imports: images, storage, views (batch), errors, uri.
"""
