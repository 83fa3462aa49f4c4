"""What a card is made from: sets, networks, and the table of vectors of each. Start at `tables.py`.

In: shards or vectors, and models by their names. Out: tables of vectors of the same images.
Imports: card.card, embed, errors, evaluate, heartbeat, shards, storage, uri.
"""
