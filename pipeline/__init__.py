"""raydino: from a pile of images to a curated data set and a DINOv2 backbone, on any Ray cluster.

Importing this package loads neither torch nor ray nor mlflow; the parts that need them import them.
"""

__version__ = "0.2.0"
