"""Shards to the batches of training workers, in an order that `order.py` fixes. Start there.

In: a `ShardSet`, a seed, a step. Out: chunks of crops for each worker; no image lost or twice.
`reader` reads row groups, `decoder` cuts, `feeder` owns the data sets, `worker` takes them.
Imports: images, shards, views, storage, driver (mailbox), plan (READ_CPUS), errors.
"""
