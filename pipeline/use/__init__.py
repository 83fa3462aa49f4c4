"""A backbone in use: what it looks at, its parts, masks from one example. Start at `network.py`.

In: a backbone and normalised images `[B, C, H, W]`. Out: tensors `[B, …]` over the grid of patches,
and pictures of them. After `network.py` read `attention.py`, `components.py`, `segment.py`.
No Ray and no config; `pipeline/stages/look.py` is the stage around it.
"""
