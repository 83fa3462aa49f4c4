"""A model and its vectors over HTTP, with one page to browse. Start at `app.py`.

In: what opens a model (`embed`) and its vectors (`search`). Out: an application that answers.
`app.py` has all addresses; `deployment.py` puts it on Ray Serve, with batches.
"""
