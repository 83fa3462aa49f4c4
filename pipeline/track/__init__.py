"""Tracking: a local journal first, MLflow from a thread. No import here loads MLflow."""

from __future__ import annotations

from pipeline.track.driver import Pipeline, open_pipeline
from pipeline.track.endpoint import JOURNAL_ONLY, links
from pipeline.track.sender import sync
from pipeline.track.settings import TrackSettings
from pipeline.track.tracker import NullTracker, Tracker, tracker_from

__all__ = [
    "JOURNAL_ONLY",
    "NullTracker",
    "Pipeline",
    "TrackSettings",
    "Tracker",
    "links",
    "open_pipeline",
    "tracker_from",
    "sync",
]
