"""What a job tells on the console beside its stages: what is left, and the last lines.

In: a config, numbers of images, results. Out: seconds, and lines. Imports: train's estimate, plan.
"""
