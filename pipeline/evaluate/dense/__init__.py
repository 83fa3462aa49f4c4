"""Scores of patches: segmentation and depth. Start at `segmentation.py`.

In: patch tokens of a frozen network, masks and depth maps. Out: fitted heads, and what each image
adds to a score. No files are read here: `pipeline/card/dense/` puts it together.
"""
