"""Which images of a pile to train on, with one reason for each that is left out. Start at `run.py`.

In: image shards, seed sets, evaluation sets. Out: decisions, curated shards, a report.
`run.py` has all steps up to the decisions in order, `run_*.py` has the steps, `curation.py` what
they give back; `stages/curate.py` then writes report and shards.
The pages here join the rooms below: steps, rows, images, embed, look, threshold, copies, choose,
decide, report. Imports: all of them, config, context, images, shards, storage, train (weights).
"""
