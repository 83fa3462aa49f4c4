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
from typing import Any

NOTE = """Each run has its stages below it; its page has the verdict, scores, data and the model.

**Charts in a readable order:** the link `charts` that a job prints; it ends with
`compareRunsMode=CHART&viewStateShareKey=raydino`.

**To compare two runs,** tick them and press *Compare*. Params `yaml/…` are what a recipe changes.

**To filter:** `tags.stage = 'pipeline'`, `tags.status = 'guarded'`, `tags.verdict = 'good'`,
`tags.has_labels = 'true'`, `tags.curated = 'dedup'`, `tags.recipe = 'demo'`.
"""
KEY = "raydino"
TAG = f"mlflow.sharedViewState.{KEY}"
SCORE = "eval/knn20_top1"
# In this order. They are called as MLflow calls them, by the part of a metric's name before the
# last `/`. A section that is named here is shown without charts, too; so these are those that a run
# always has, and MLflow puts others behind them.
SECTIONS = ("eval", "loss", "health")
METRICS = ("loss/total", "health/effective_rank", "health/feature_std", "health/teacher_entropy")
# Of the table of runs, with their widths in pixels; they fit into a window of 1,280.
COLUMNS = {
    "attributes.`Run Name`": 150,
    "metrics.`{score}_final`": 150,
    "attributes.`Description`": 270,
    "tags.`status`": 80,
    "params.`network`": 100,
    "params.`images`": 70,
    "params.`steps`": 70,
    "runDateAndNestInfo": 130,
    "duration": 80,
    "attributes.`Dataset`": 160,
    "attributes.`Models`": 160,
    "attributes.`Source`": 100,
}
ALWAYS = ("attributes.`Run Name`", "runDateAndNestInfo", "duration")  # no choice of the reader's


def view(score: str = SCORE) -> str:
    """The value of the tag.

    Args:
        score: metric that decides, `eval/knn20_top1`; its final value is `<score>_final`.
    """
    sections = [
        {
            "uuid": _id(name),
            "name": name,
            "display": True,
            "isReordered": True,  # or MLflow sorts what it adds
            "deleted": False,
            "isGenerated": True,
        }
        for name in SECTIONS
    ]
    columns = {name.format(score=score): width for name, width in COLUMNS.items()}
    shown: dict[str, Any] = {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [name for name in columns if name not in ALWAYS],
        "columnOrder": list(columns),
        "columnWidths": columns,
        "compareRunCharts": [_line(score), _bar(f"{score}_final"), *map(_line, METRICS)],
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
    # not as one of MLflow's own, which become lines where the step is not 0
    return _card("BAR", metric, metricKey=metric) | {"isGenerated": False}
