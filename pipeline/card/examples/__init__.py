"""A few images that show what a model does: their neighbours, and what it sees in them. Start at
`kept.py`.

In: the tables of vectors of an evaluation, and its networks. Out: `examples.json` beside the card.
"""
