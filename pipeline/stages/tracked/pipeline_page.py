"""The page of the pipeline's run in MLflow, the one that people open.

Its description is the verdict with the scores, its parameters are the eight that a person asks for
and behind them what the recipe changes, and its tags are there to filter by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.card.card import BASELINES, Card, SetFacts, Verdict
from pipeline.card.shown.page import mood_of
from pipeline.card.words import title_of, with_margin
from pipeline.config.config import Config
from pipeline.config.load import field_paths
from pipeline.config.network import Model
from pipeline.plan.plan import Plan
from pipeline.plan.resume import value_at
from pipeline.uri import public

APART = "\u00a0\u00a0"  # MLflow draws columns of a table without a gap
# Where a run goes and what it may take of a machine is no part of what is compared; the seed and
# the sizes stand among the eight.
NOT_COMPARED = ("run.", "track.", "resources.")


def name_of_images(config: Config) -> str:
    """What the training images are called: as the user names them."""
    name = short_name(config.data.source or config.data.shards)
    return f"{name} (curated)" if config.curate.preset else name


def parameters(plan: Plan) -> dict[str, Any]:
    """The eight that a person asks for first."""
    config = plan.config
    return {
        "network": _network(config.model),
        "image size": config.augment.global_size,
        "steps": plan.steps,
        "batch": config.optim.global_batch_size,
        "rate": f"{plan.lr:.3g}",
        "images": plan.images,
        "curation": config.curate.preset or "none",
        "seed": config.run.seed,
    }


def _network(model: Model) -> str:
    """`ViT-S/14`; by width and depth where they are not those of the size; or its encoder."""
    if model.encoder != "dinov2":
        return model.encoder.rpartition(":")[2]
    width, depth, _ = model.dimensions
    usual = model.width is None and model.depth is None and model.heads is None
    return f"ViT{f'-{model.size[-1].upper()}' if usual else f' {width}x{depth}'}/{model.patch_size}"


def changed_fields(config: Config) -> dict[str, str]:
    """Fields that are not as they are by default, by their path, with their values as text."""
    usual = Config()
    fields = {}
    for path, _ in field_paths():
        value = value_at(config, path)
        if not path.startswith(NOT_COMPARED) and value != value_at(usual, path):
            fields[path] = _text(value)
    return fields


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return public(str(value))


def tags_of(config: Config) -> dict[str, str]:
    """What is known of a run before it begins."""
    return {"recipe": config.run.name, "curated": config.curate.preset or "no"}


def verdict_tags(card: Card) -> dict[str, str]:
    """`verdict` is `good`, `bad` or `open`; the rule says why."""
    labelled = bool(card.reference.labelled)
    rule = card.verdict.rule or "none"
    return {
        "verdict": mood_of(card.verdict),
        "verdict.rule": rule,
        "has_labels": str(labelled).lower(),
    }


def datasets_of(card: Card) -> list[SetFacts]:
    """The sets that scores are of, the one that is asked first."""
    return [one for one in (card.queries, card.reference) if one is not None]


def short_name(name: str) -> str:
    """A set as MLflow has room for it: of a path in full the last two parts."""
    parts = public(name).rstrip("/").split("/")
    return "/".join(parts[-2:]) if len(parts) > 3 else public(name)


def note(card: Card | None, results: Mapping[str, str], verdict: Verdict) -> str:
    """The description of the run: verdict, scores, what each stage came to; markdown.

    Args:
        card: of the evaluation; None: there is none.
        results: a sentence by stage.
        verdict: of the evaluation, with an empty text where there is none.
    """
    last = next(reversed(list(results.values())), "")
    parts = [verdict.text or results.get("evaluate", last)]
    if card is not None and (table := score_table(card)):
        parts.append(table)
    parts.append("\n".join(f"* **{stage}** {_line(text)}" for stage, text in results.items()))
    parts.append("Pictures and curves on one page: *Artifacts*, `report.html`.")
    return "\n\n".join(parts)


def score_table(card: Card) -> str:
    """The score that decides, a row for the model and for each thing that stands beside it."""
    shown = [one for one in card.contenders if card.score in one.results]
    if not shown:
        return ""
    rows = [f"| what{APART} | {title_of(card.score)} |", "| :--- | ---: |"]
    for one in shown:
        cell = _line(one.name).replace("|", "\\|")
        name = f"**{cell}**" if one.role == "model" else BASELINES[one.role]
        rows.append(f"| {name}{APART} | {with_margin(one.results[card.score].interval)} |")
    return "\n".join(rows)


def _line(text: str) -> str:
    return public(text).replace("\n", " ")
