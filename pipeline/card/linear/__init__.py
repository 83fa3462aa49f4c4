"""The linear grid over tables of vectors of any size. Start at `scores.py`.

In: labelled tables of vectors. Out: `linear_top1` and what each head of the grid scores.
"""
