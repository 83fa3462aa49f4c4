"""The charts of an experiment as they stand when somebody opens the link that a job prints.

MLflow keeps the arrangement of charts in the browser, but for a view that was shared: that is a tag
of the experiment, `mlflow.sharedViewState.<key>`, which `?viewStateShareKey=<key>` opens. A client
may write the tag. So the link shows the score that decides, the loss and the health of the features
first. Whatever else is there follows, by the part of its name before the `/`, the machine last.

The charts of a single run cannot be arranged from outside: they stand by their names.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

NOTE = """Runs of one recipe. Each has its stages below it; its page has the verdict and the scores.

**Charts in a readable order:** the link `charts` that a job prints; it ends with
`compareRunsMode=CHART&viewStateShareKey=raydino`.

**To compare two runs,** tick them and press *Compare*. Params `yaml/…` are what a recipe changes.

**To filter:** `tags.stage = 'pipeline'`, `tags.status = 'guarded'`, `tags.verdict = 'good'`,
`tags.has_labels = 'true'`, `tags.curated = 'dedup'`, `tags.recipe = 'demo'`.
"""
KEY = "raydino"
TAG = f"mlflow.sharedViewState.{KEY}"
SCORE = "eval/knn20_top1"
# In this order; the closed ones are opened by a click. Names of sections are those that MLflow
# gives them, the part of a metric's name before the last `/`, so that it puts new metrics there.
OPEN = ("eval", "loss", "health", "first and last step", "guard")
CLOSED = ("pictures", "optim", "curate", "embed", "data", "perf", "Model metrics", "System metrics")
METRICS = (
    *("loss/total", "health/effective_rank", "health/feature_std", "health/teacher_entropy"),
    *("curate/kept", "data/images"),
)
PICTURES = ("neighbours", "patch_pca")
COLUMNS = (
    *("attributes.`Dataset`", "attributes.`Models`", "attributes.`Source`"),
    *("params.`network`", "params.`images`", "params.`steps`"),
    *("tags.`status`", "tags.`verdict`"),
)


def view(score: str = SCORE) -> str:
    """The value of the tag.

    Args:
        score: metric that decides, `eval/knn20_top1`; its final value is `<score>_final`.
    """
    sections = [
        {
            "uuid": _id(name),
            "name": name,
            "display": name in OPEN,
            "isReordered": True,  # or MLflow sorts what it adds
            "deleted": False,
            "isGenerated": True,
        }
        for name in (*OPEN, *CLOSED)
    ]
    charts = [
        _line(score),
        _bar(f"{score}_final"),
        *[_line(name) for name in METRICS[:4]],
        *[_picture(f"first and last step/{name}") for name in PICTURES],
        *[_bar(name) for name in METRICS[4:]],
    ]
    shown: dict[str, Any] = {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [*_columns(score)],
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {
            "xAxisKey": "step",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": "",
        },
    }
    return json.dumps(shown, separators=(",", ":"))


def _columns(score: str) -> Sequence[str]:
    return (*COLUMNS[-2:], f"metrics.`{score}_final`", "metrics.`loss/total`", *COLUMNS[:-2])


def _id(name: str) -> str:
    """Always the same one, so that the tag changes only where the view does."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"raydino/{name}"))


def _card(kind: str, name: str, **more: Any) -> dict[str, Any]:
    section, _, shown = name.rpartition("/")
    return {
        "uuid": _id(f"{kind} {name}"),
        "type": kind,
        "runsCountToCompare": 10,
        "metricSectionId": _id(section or "Model metrics"),
        "deleted": False,
        "isGenerated": True,
        "displayName": shown,
        **more,
    }


def _line(metric: str) -> dict[str, Any]:
    return _card(
        "LINE",
        metric,
        metricKey=metric,
        lineSmoothness=0,
        xAxisScaleType="linear",
        scaleType="linear",
        range={},
        xAxisKey="step",
        selectedXAxisMetricKey="",
        yAxisKey="metric",
        yAxisExpressions=[],
        ignoreOutliers=False,
        useGlobalXaxisKey=True,
        useGlobalLineSmoothing=True,
    )


def _bar(metric: str) -> dict[str, Any]:
    return _card("BAR", metric, metricKey=metric)


def _picture(key: str) -> dict[str, Any]:
    """Without the run's parameters, which MLflow else prints above each picture."""
    return _card("IMAGE", key, imageKeys=[key], step=0, showRunParams=False)
