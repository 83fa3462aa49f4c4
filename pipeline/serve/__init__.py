"""A model and its vectors over HTTP: vectors, neighbours, pictures, and one page to browse.

In: what opens a model (`embed`) and its vectors (`search`). Out: an application that answers.
Start at `app.py`, which has all addresses; `deployment.py` puts it on Ray Serve, with batches.
"""
