"""What a curation asks of single images, each decoded once. Start at `fingerprint.py`.

In: shards. Out: measures, marks of rules, descriptors, groups of equal images.
Imports: rows, steps, images, shards, storage, views, uri.
"""
