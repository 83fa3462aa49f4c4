"""Pages and figures: one look for every page that we write. Start at `page.py`.

In: numbers, tables, small pictures. Out: one HTML file that needs nothing else.
Imports: track (one write), uri.
"""
