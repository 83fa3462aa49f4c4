"""Images in and out: shards, decoding, crops, batches."""
