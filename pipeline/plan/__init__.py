"""What follows from a recipe, the data and the machines. Start at `plan.py`.

In: a `Config`, the number of images, the nodes. Out: a `Plan`: steps, batches, workers, places.
Imports: config, schedule, errors. No torch, no Ray.
"""
