"""Backbone, heads, student and teacher, and weights in and out. Start at `vit.py`.

In: images [B, C, H, W]. Out: CLS and patch tokens; weights in three formats.
Imports: images (range), views (crops), storage, schedule, errors.
"""
