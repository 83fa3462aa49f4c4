"""Images to the unit vectors that a curation compares. Start at `embed.py`.

In: shards and an `Embedder` of `pipeline.embed`. Out: vectors of unit length in half precision.
Imports: embed, images, rows, steps, shards, storage, errors, uri.
"""
