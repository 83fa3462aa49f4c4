"""Shards to the batches of training workers, in an order that `order.py` fixes. Start there.

In: a `ShardSet`, a seed, a step. Out: chunks of crops for each worker; no image lost or twice.
`reader` reads row groups, `decoder` cuts, a `dealer` owns data sets of a stream. `feeder` starts
the streams of a run: `dealing` says what each takes, `windows` shares what is read. `worker` takes.
Imports: images, shards, views, storage, driver (mailbox), plan (READ_CPUS, streams), errors.
"""
