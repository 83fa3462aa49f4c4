"""Images to vectors, for curation, evaluation, search and use alike. Start at `embedders.py`.

In: shards, and a model: a run, weights, timm, ONNX or the descriptor. Out: a table of vectors.
Imports: images, shards, storage, views, model, evaluate, train; curate.images for the descriptor.
"""
