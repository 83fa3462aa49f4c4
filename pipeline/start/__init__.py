"""The recipe that fits a folder of images and a machine, with a reason for each value. Start at
`choose.py`.

In: a place of images, maybe weights. Out: a YAML file that `jobs/run.py` takes, and what it takes
in hours. Imports: adapt's recipe, doctor, plan, train's estimate.
"""
