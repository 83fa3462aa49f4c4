"""How good is a backbone: k-NN, health, pictures. Start at `teacher.py`.

In: a network and shards. Out: accuracy where there are labels, and numbers of health in any case.
Imports: model, loss (sums over workers), shards, images, views, errors, uri.
"""
