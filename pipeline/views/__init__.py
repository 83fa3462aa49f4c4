"""Crops, colours and masks as pure functions of a key. Start at `crops.py`.

In: uint8 images, a seed, a step. Out: float views and masks; the same ones on every machine.
Imports: errors.
"""
