"""`report.html` of a run: the result first, then how it came about. Start at `write.py`.

In: what a run folder holds (marks of stages, card, examples, journal). Out: one page. No Ray.
"""
