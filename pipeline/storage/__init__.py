"""Bytes on disks and in buckets: places, retries, whole writes, run folders. Start at `places.py`.

In: a path or URI. Out: a file system that tries again, and files that are whole or not there.
Imports: errors, uri, environment, images (kinds of files).
"""
