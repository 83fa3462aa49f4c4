"""The similarity above which images are copies, from the user's images. Start at `calibrate.py`.

In: a sample of the images, some of them attacked. Out: a threshold, and how sure it is.
Imports: embed, images, look, rows, steps, views, uri.
"""
