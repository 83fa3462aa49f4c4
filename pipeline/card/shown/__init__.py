"""A card as people see it: its page, a picture for MLflow, and two cards beside one another. Start
at `page.py`.

In: a `Card`. Out: files of HTML, and pixels.
"""
