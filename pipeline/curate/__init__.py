"""Curation: which images of a pile to train on, with one reason for each that is left out."""
