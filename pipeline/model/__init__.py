"""Backbone, heads, and the student-teacher pair."""
