"""What evaluations hand to the guard of a training, and what is left of the start without labels.

Numpy alone, so that whoever decides needs no torch: `train/guard`. `measure.py` takes features.
"""
