"""From the user's images: the similarity above which a pair is looked at. Start at `calibrate.py`.

In: a sample of the images, some of them attacked. Out: a threshold, and how sure it is.
Imports: embed, images, look, rows, steps, views, uri.
"""
