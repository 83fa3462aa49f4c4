"""The second look: do two images that are alike show the same? Start at `second_look.py`.

In: pairs of images. Out: a verdict for each, with the place where they differ.
Imports: images, rows, steps, shards, storage, uri.
"""
