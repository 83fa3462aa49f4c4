"""What a run reports: into a local journal first, from there to MLflow. Start at `tracker.py`.

In: metrics, pictures, tables, files. Out: lines of the journal, and a run of MLflow that is made
from them: by a thread (`sender.py`) while the job runs, by `sync` after it. No import here loads
MLflow.
Imports: environment, heartbeat, log, errors, uri; in functions images, model, views (embedder).
"""

from __future__ import annotations

from pipeline.track.driver import Pipeline, open_pipeline
from pipeline.track.endpoint import JOURNAL_ONLY, links
from pipeline.track.sender import sync
from pipeline.track.settings import TrackSettings
from pipeline.track.tracker import ModelCard, NullTracker, Tracker, tracker_from

__all__ = [
    "JOURNAL_ONLY",
    "ModelCard",
    "NullTracker",
    "Pipeline",
    "TrackSettings",
    "Tracker",
    "links",
    "open_pipeline",
    "tracker_from",
    "sync",
]
