"""Fine-tuning: a backbone and labelled shards in, a classifier, its accuracy and its weights out.

Read `loop.py` first: it is the algorithm. `classifier` is what it trains, `images` what it trains
on, `rows` which of them; `worker` is one process of Ray Train, `run` the driver's side.
"""
