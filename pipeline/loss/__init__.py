"""The loss terms of DINOv2, and the targets that they need. Start at `dino.py`.

In: logits and features [rows, K or D]. Out: a scalar for each term.
Imports: errors.
"""
