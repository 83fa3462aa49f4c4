"""A run on several devices: what each worker holds of the networks, and how gradients are added up.

Start at `strategy.py`. In: a `Pair`. Out: the student's forward, norms, whole weights.
Imports: errors, model.
"""
