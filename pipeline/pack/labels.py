"""Label files beside images, as WebDataset has them: `0001.cls` is the label of `0001.jpg`.

The label of an image is in the file that has its name up to one of its dots: for `a.left.jpg` that
is `a.left.cls`, else `a.cls`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MAX_BYTES = 2**20  # a JSON beside an image may be long
_MAX_LETTERS = 200


@dataclass(frozen=True)
class Label:
    """What a label file says: a class id, or the name of a class. Negative ids mean none."""

    source: str
    key: str
    value: int | str


class LabelFiles:
    """Which files hold labels: `data.label_member`, an ending or `ending:field` of a JSON."""

    def __init__(self, member: str) -> None:
        ending, _, field = member.partition(":")
        self.ending = f".{ending.lstrip('.').lower()}" if ending else ""
        self.fields = field.split(".") if field else []

    def key(self, path: str) -> str | None:
        """The path without the ending of label files; None for other files."""
        fits = self.ending and path.lower().endswith(self.ending)
        return path[: -len(self.ending)] if fits else None

    def value(self, content: bytes) -> int | str:
        """What a label file says.

        Raises:
            ValueError: nothing that can be a label.
        """
        if len(content) > MAX_BYTES:
            raise ValueError(f"{len(content)} bytes are no label")
        text = content.decode("utf-8-sig").strip()
        label: object = self._field(text) if self.fields else text
        if isinstance(label, str):
            label = _number(label.strip())
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(f"{str(label)[:40]!r} is neither a class id nor a name")
        if isinstance(label, int):
            if label >= 2**63:
                raise ValueError(f"the class id {str(label)[:40]} is too large")
            return max(-1, label)
        if not label or len(label) > _MAX_LETTERS or not label.isprintable():
            raise ValueError(f"{label[:40]!r} is no name of a class")
        return label

    def _field(self, text: str) -> object:
        try:
            node = json.loads(text)
        except RecursionError as error:
            raise ValueError("the JSON is too deep") from error
        for name in self.fields:
            if not isinstance(node, dict) or name not in node:
                raise ValueError(f"the JSON has no field {'.'.join(self.fields)}")
            node = node[name]
        return node


def _number(text: str) -> int | str:
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else text


def names_of(path: str) -> Iterator[str]:
    """What a label file of this image may be called, without its ending; the longest first."""
    folder, slash, name = path.rpartition("/")
    while "." in name:
        name = name.rpartition(".")[0]
        yield folder + slash + name


def label_of(path: str, labels: Mapping[str, int | str]) -> tuple[str, int | str] | None:
    """Key and value of an image's label, if there is one."""
    return next(((key, labels[key]) for key in names_of(path) if key in labels), None)
