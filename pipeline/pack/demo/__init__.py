"""A small labelled set without any download: tiles of photographs that two packages bring.

In goes a folder to write, out come tiles of 16 classes for training and test, with flaws planted
among the first. Read `tiles.py` first; `flaws.py` has what is planted.
"""
