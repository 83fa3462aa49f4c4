"""How good a backbone is: scores, numbers of health, pictures. Start at `teacher.py`.

In: a network and shards, or its features. Out: scores with what each image adds, and numbers of
health in any case. `neighbours/` needs no training, `classifiers/` learns from labels, `dense/` is
of patches; `guard/` is what a training is compared with its start by.
Imports: model, loss (sums over workers), shards, images, views, errors, uri; `sets.py`: config.
"""
