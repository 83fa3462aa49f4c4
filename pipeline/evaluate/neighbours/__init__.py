"""Scores of the nearest images: k-NN, retrieval, copy detection. Start at `nearest.py`.

In: features with labels and ids, in memory; `pipeline/card/nearest.py` does it for tables of any
size. Out: the nearest rows of each query, whose cosines have the same bits in any blocks
(`exact.py`), and scores.
Imports: evaluate.baselines, evaluate.features, evaluate.score, errors.
"""
