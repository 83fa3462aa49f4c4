"""What the pixels of images say, and which images are equal. Start at `fingerprint.py`.

In: shards, decoded once for all that is asked here. Out: measures, marks of rules, descriptors,
groups of equal images.
Imports: rows, steps, images, shards, storage, views, uri.
"""
