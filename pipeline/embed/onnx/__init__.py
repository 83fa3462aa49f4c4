"""Models in ONNX, ours or a user's, as embedders. Start at `embedder.py`.

In: a file or a folder of them, anywhere. Out: a model that says itself what it takes and gives, and
its copy on a node. Nothing of a file is unpickled.
Imports: errors, images, storage, uri.
"""
