"""What stops a job before it starts, for the job and its dry run alike. Start at `start.py`.

In: a config and the stages that are asked for. Out: errors, and what is known of the image sets
that it names before they are packed. Needs no Ray, and nothing that it writes stays.
Imports: config, context, curate, embed, errors, evaluate, images, pack, shards, stages, storage,
track, uri.
"""
