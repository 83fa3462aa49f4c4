"""Distillation from the features of any frozen network. Start at `features.py`.

In: a `Pair`, and what names the teacher. Out: terms of the loss, an adapter, lines of the plan.
Imports: config, errors, images, loss, model, plan, train.checkpoint, views.
"""
