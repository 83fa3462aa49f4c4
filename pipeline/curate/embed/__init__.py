"""Images to unit vectors: by descriptor, a run's backbone, weights or ONNX. Start at `embed.py`.

In: shards and an `Embedder`. Out: one file of vectors for each input file.
Imports: images, rows, steps, shards, storage, errors, uri; in functions model, evaluate, views.
"""
