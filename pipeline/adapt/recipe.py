"""The derived recipe: fields with values and reasons, as lines, as YAML and as a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from pipeline.config.config import Config
from pipeline.config.load import checked

Whose = Literal["weights", "images", "yours"]


@dataclass(frozen=True)
class Line:
    """One field of the recipe.

    Attributes:
        field: `section.name`.
        value: as JSON has it.
        reason: why this value, in a line.
        whose: what it follows from: the weights, the number of images, or the user's own words.
    """

    field: str
    value: Any
    reason: str
    whose: Whose


@dataclass(frozen=True)
class Recipe:
    """What an adaptation trains with, beyond the user's own fields."""

    lines: tuple[Line, ...]

    def applied(self, config: Config) -> Config:
        """The config with all derived values; what it sets itself stays, and null leaves open.

        Raises:
            ConfigError: user's and derived values do not fit each other.
        """
        values = set_values(config)
        for line in self.lines:
            if line.field == "optim.steps" and is_set(config, "optim.passes"):
                continue  # the user says the length in another way
            if line.whose != "yours":
                section, _, name = line.field.partition(".")
                fields = values.setdefault(section, {})
                if fields.get(name) is None:
                    fields[name] = line.value
        return checked(values)

    def value(self, field: str) -> Any:
        """What the recipe says of a field.

        Raises:
            KeyError: it says nothing.
        """
        return {line.field: line.value for line in self.lines}[field]

    def with_line(self, line: Line) -> Recipe:
        """The recipe with one more line, in the place of an earlier one of the same field."""
        return Recipe((*(one for one in self.lines if one.field != line.field), line))

    def within(self, earlier: Recipe) -> Recipe:
        """The lines whose fields are those of an earlier recipe."""
        fields = {line.field for line in earlier.lines}
        return Recipe(tuple(line for line in self.lines if line.field in fields))

    def columns(self) -> dict[str, list[Any]]:
        """As a table for a tracker."""
        return {
            "field": [line.field for line in self.lines],
            "value": [str(line.value) for line in self.lines],
            "follows from": [line.whose for line in self.lines],
            "reason": [line.reason for line in self.lines],
        }

    def said(self) -> list[str]:
        """For the console: the weights' facts in one line, then a line for each choice."""
        facts = " ".join(_assigned(line) for line in self.lines if line.whose == "weights")
        chosen = [line for line in self.lines if line.whose != "weights"]
        return [
            f"of weights  {facts}",
            *(f"recipe      {_assigned(line)}: {line.reason}" for line in chosen),
        ]

    def to_json(self) -> list[list[Any]]:
        """As a stage's result keeps it."""
        return [[line.field, line.value, line.reason, line.whose] for line in self.lines]

    @classmethod
    def from_json(cls, rows: Sequence[Sequence[Any]]) -> Recipe:
        """What `to_json` gave."""
        return cls(tuple(Line(*row) for row in rows))


def set_values(config: Config) -> dict[str, Any]:
    """What a recipe and its command line have set, by section; no defaults."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    return values


def is_set(config: Config, field: str) -> bool:
    """Whether the user has set a field (`section.name`) to something; null leaves it open."""
    section, _, name = field.partition(".")
    return set_values(config).get(section, {}).get(name) is not None


def written(recipe: Recipe, config: Config) -> str:
    """The whole recipe as a YAML file that `jobs/run.py` takes: a reason behind each value.

    Args:
        recipe: the derived one.
        config: with it applied.
    """
    reasons = {line.field: line.reason for line in recipe.lines}
    values = set_values(config)
    values.pop("adapt", None)  # the file says all that was derived, so that nothing is left to be
    lines = [
        "# What jobs/adapt.py derived and trained with. jobs/run.py takes this file as it is;",
        "# another run.name keeps what is there.",
    ]
    for section, fields in values.items():
        if not isinstance(fields, dict):
            lines.append(f"{section}: {flow(fields)}")
            continue
        lines.append(f"{section}:" if fields else f"{section}: {{}}")
        for name, value in fields.items():
            reason = reasons.get(f"{section}.{name}", "")
            lines.append(f"  {name}: {flow(value)}" + f"  # {reason}" * bool(reason))
    return "\n".join(lines) + "\n"


def _assigned(line: Line) -> str:
    value = line.value
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, float):
        value = f"{value:.4g}"
    elif isinstance(value, list | tuple):
        value = "[" + ",".join(f"{one:.4g}" for one in value) + "]"
    return f"{line.field}={value}"


def flow(value: Any) -> str:
    """A value as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.strip().removesuffix("...").strip()
