"""A recipe for given weights and given images, and what came of it. Start at `derive.py`.

In: weights, and the number of images. Out: fields of the config with reasons; the two cards
compared. Imports: card, config, embed, model, plan, train's checkpoints.
"""
