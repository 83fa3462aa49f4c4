"""YAML as recipes have it: the numbers of YAML 1.2, no key twice, no more than a recipe can need.

PyYAML reads YAML 1.1, in which `0100` is 64, `1:30` is 90, `no` is false and `1e-3` is text, and of
two equal keys it keeps the last. Only its parser is used here; what a value means is decided below.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.errors import ConfigError, shortened

LARGEST = 2**18  # bytes of a recipe
DEEPEST = 24  # brackets within brackets
MOST = 20_000  # values, those that aliases repeat included
LONGEST_NUMBER = 100  # characters
SHOWN = 60

TAG = "tag:yaml.org,2002:"
PLAIN = "plain"
NOTHING = ("", "~", "null", "Null", "NULL")
WORDS = {"true": True, "false": False}
# The core schema of YAML 1.2, section 10.3.2
WHOLE = re.compile(r"[-+]?[0-9]+")
BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
OTHER_TEXT = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decoded(content: bytes, name: str) -> str:
    """The text of a recipe's bytes.

    Raises:
        ConfigError: they are not UTF-8, or too many.
    """
    if len(content) > LARGEST:
        raise ConfigError(
            f"{name} has {len(content):,} bytes, and a recipe has {LARGEST:,} at most",
            "images are named by data.source=…; the recipe is a small YAML file",
        )
    for mark, encoding in OTHER_TEXT.items():
        if content.startswith(mark):
            raise ConfigError(f"{name} is not YAML: it is {encoding} text", "save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name} is not YAML: line {line} is not UTF-8 (byte 0x{content[error.start]:02x})",
            "save it as UTF-8",
        ) from None


class Unreadable(Exception):
    """A text has no meaning here: the line, why, and whether it is YAML at all."""

    def __init__(self, line: int, why: str, yaml: bool = True) -> None:
        super().__init__(why)
        self.line, self.why, self.yaml = line, why, yaml


def parsed(text: str, is_text: Callable[[str], bool] = lambda path: False, path: str = "") -> Any:
    """The value that a text means.

    Args:
        text: one YAML document.
        is_text: tells whether the field `a.b` is text, which then stays as it is written: a run may
            be called `2026` or `no`. Only the words for nothing mean nothing there, too.
        path: of the value, `a.b`; empty: the whole recipe.

    Raises:
        Unreadable: it is not YAML, or more than a recipe can need.
    """
    try:
        node = _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        raise _unreadable(text, error) from None
    return None if node is None else _Meaning(is_text).of(node, path, 0)


class _Loader(yaml.SafeLoader):
    """Makes nodes that do not lie too deep. Those without quotes and tag are `PLAIN`."""

    depth = 0

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> str:
        if kind is ScalarNode and implicit[0]:
            return PLAIN
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise Unreadable(line, f"it lies more than {DEEPEST} levels deep")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Meaning:
    """What nodes mean. An alias counts as often as it is used."""

    def __init__(self, is_text: Callable[[str], bool]) -> None:
        self.is_text, self.values = is_text, 0

    def of(self, node: Node, path: str, depth: int) -> Any:
        self.values += 1
        if self.values > MOST or depth > DEEPEST:
            raise Unreadable(
                _line(node), f"aliases make more than {MOST:,} values, or {DEEPEST} levels"
            )
        if isinstance(node, MappingNode):
            _known_tag(node, "map")
            pairs = self._pairs(node, depth)
            return {
                key: self.of(value, f"{path}.{key}".lstrip("."), depth + 1)
                for key, value in pairs.items()
            }
        if isinstance(node, SequenceNode):
            _known_tag(node, "seq")
            return [self.of(value, path, depth + 1) for value in node.value]
        return self._scalar(node, path)

    def _pairs(self, node: MappingNode, depth: int) -> dict[str, Node]:
        """The node's own keys, and before them those of mappings that `<<` names."""
        own: dict[str, Node] = {}
        lines: dict[str, int] = {}
        merged: dict[str, Node] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise Unreadable(_line(key), "a key must be a name")
            name = str(key.value)
            if name in lines:
                both = lines[name], _line(key)
                where = f"on line {both[0]}" if both[0] == both[1] else "on lines {} and {}"
                why = f"{shortened(name, SHOWN)} stands twice, {where.format(*both)}; keep one"
                raise Unreadable(both[1], why)
            lines[name] = _line(key)
            if name == "<<" and key.tag == PLAIN:
                merged = self._merged(value, depth)
            else:
                own[name] = value
        return merged | own

    def _merged(self, node: Node, depth: int) -> dict[str, Node]:
        self.values += 1
        if self.values > MOST or depth > DEEPEST:
            raise Unreadable(_line(node), "`<<` leads too far")
        if isinstance(node, MappingNode):
            return self._pairs(node, depth + 1)
        if isinstance(node, SequenceNode):  # of the same key in two of them the first one counts
            result: dict[str, Node] = {}
            for one in reversed(node.value):
                result |= self._merged(one, depth + 1)
            return result
        raise Unreadable(_line(node), "`<<` takes a mapping, such as *name")

    def _scalar(self, node: Node, path: str) -> Any:
        text = str(node.value)
        if node.tag != PLAIN:
            _known_tag(node, "str")
            return text
        if text in NOTHING:
            return None
        if self.is_text(path):
            return text
        if text.lower() in WORDS and text in (text.lower(), text.upper(), text.capitalize()):
            return WORDS[text.lower()]
        if len(text) > LONGEST_NUMBER and FLOAT.fullmatch(text):
            raise Unreadable(_line(node), f"a number of {len(text):,} characters")
        if WHOLE.fullmatch(text):
            return int(text)
        if BASED.fullmatch(text):
            return int(text, 0)
        if FLOAT.fullmatch(text):
            return float(text)
        if NOT_FINITE.fullmatch(text):
            return float(text.replace(".", ""))
        return text


def _known_tag(node: Node, kind: str) -> None:
    if node.tag != TAG + kind:
        tag = shortened(node.tag.replace(TAG, "!!"), SHOWN)
        raise Unreadable(_line(node), f"the tag {tag} is not for recipes", yaml=False)


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _unreadable(text: str, error: yaml.YAMLError) -> Unreadable:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        why = f"the control character U+{error.character:04X}; save it as UTF-8 text"
        return Unreadable(line, why, yaml=False)
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    why = str(getattr(error, "problem", None) or error)
    if "'\\t'" in why:
        why = "a tab; YAML is indented by blanks"
    elif "another document" in why:
        why = "a second document begins; a recipe is one"
    return Unreadable(mark.line + 1 if mark else 1, shortened(why, SHOWN), yaml=False)
