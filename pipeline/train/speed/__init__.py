"""How fast a training is: what a step costs, where its time goes. Start at `bottleneck.py`.

In: a network and its batch, and the seconds of each step. Out: FLOPs and memory of a step, the line
of the log, a sentence on what holds the training up, and a trace of some steps.
Imports: errors, storage, uri, views.
"""
