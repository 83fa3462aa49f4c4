"""A backbone in use: what it looks at, which parts it tells apart, masks from one example.

In: a backbone and normalised images `[B, C, H, W]`. Out: tensors `[B, …]` over the grid of patches,
and pictures of them. Read `network.py` first, then `attention.py`, `components.py`, `segment.py`.
No Ray and no config; `pipeline/stages/look.py` is the stage around it.
"""
