"""The report of a curation: one page, pictures and numbers for MLflow. Start at `report.py`.

In: the tables of a finished curation. Out: sections for the page; no Ray.
Imports: choose, rows, steps, report, storage, views, errors, uri.
"""
