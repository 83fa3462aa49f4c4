"""Crops, colours and masks, drawn from seed, pass and image id. Start at `crops.py`.

In: uint8 images and their keys. Out: float views and masks; the same ones on every machine.
Imports: errors.
"""
