"""The commands: what each job runs, which words it takes, and what its `--help` says. Start at
`command.py`; `chain.py` and `uses.py` hold the table.

In: names. Out: data and text; nothing is run here. Imports: config, errors.
"""
