"""Backbone, heads and the pair of student and teacher. Start at `vit.py`.

In: images [B, C, H, W]. Out: CLS and patch tokens; weights in three formats.
Imports: images (range), views (crops), storage, schedule, errors.
"""
