"""What a classifier learns from frozen features: logistic regression, the linear grid, few images a
class. Start at `logistic.py`.

In: features with labels and ids, of one set or two. Out: top-1 scores, and how each was fitted.
`split.py` says which images are asked, so that all models are asked the same ones.
Imports: evaluate.features, evaluate.score, errors, loss (sums over workers).
"""
