"""Encoded bytes to uint8 pixels, in one way for every stage. Start at `decode.py`.

In: the bytes of a file of strangers. Out: uint8 [H, W, C], or a `BadImage` with its reason.
Imports: errors.
"""
