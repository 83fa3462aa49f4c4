"""The evaluation card: every score of every model on the same images, and a verdict. Start at
`run.py`.

In: models, sets and settings. Out: a `Card` (`card.py`), as card.json, as a page and in MLflow.
Imports: config, curate.threshold, embed, errors, evaluate, heartbeat, images, model, report,
search, shards, storage, uri, use, views.
"""
