"""Finds which config fields a source reads: `section.field` on what is known to be a config.

A small interpreter of names, not a search for words. What it follows: parameters annotated with
`Config` or a section, `….config`, functions that return one, `optim = config.optim` (tuples too),
`model_copy`, properties of sections, `getattr(section, name)` with `name` from a literal, and
`Spec(**section.model_dump(exclude={"a"}))`. A dump that is only hashed or printed reads nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel

ROOT = ""  # path of the config itself


@dataclass(frozen=True)
class Dump:
    """`section.model_dump(…)`: a mapping of these fields."""

    fields: tuple[str, ...]


Value = str | Dump | tuple[str, ...] | None  # path of a section, a dump, literal strings, unknown


class Shape:
    """What a config class has: sections, leaf fields, properties and what those read."""

    def __init__(self, model: type[BaseModel], sources: Iterable[str]) -> None:
        self.sections: dict[str, type[BaseModel]] = {ROOT: model}
        self.fields: set[str] = set()
        for name, field in model.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                self.sections[name] = kind
                self.fields |= {f"{name}.{leaf}" for leaf in kind.model_fields}
            else:
                self.fields.add(name)
        self.classes = {kind.__name__: path for path, kind in self.sections.items()}
        self.properties: dict[tuple[str, str], list[str]] = {}
        for top in (node for source in sources for node in ast.parse(source).body):
            if not isinstance(top, ast.ClassDef) or top.name not in self.classes:
                continue
            for item in top.body:
                if isinstance(item, ast.FunctionDef) and any(
                    isinstance(d, ast.Name) and d.id == "property" for d in item.decorator_list
                ):
                    section = self.classes[top.name]
                    read = [
                        f"{section}.{node.attr}"
                        for node in ast.walk(item)
                        if isinstance(node, ast.Attribute)
                        and isinstance(node.value, ast.Name)
                        and node.value.id == "self"
                    ]
                    self.properties[section, item.name] = [x for x in read if x in self.fields]


def reads(sources: Mapping[str, str], shape: Shape) -> dict[str, list[str]]:
    """Leaf field -> places (`file:line`) that read it."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    returns = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                kind = ast.unparse(node.returns).strip("'\"")
                if kind in shape.classes:
                    returns[node.name] = shape.classes[kind]
    places: dict[str, list[str]] = {}
    for name, tree in trees.items():
        _Reader(name, shape, returns, places).block(tree.body, {})
    return places


class _Reader:
    def __init__(
        self, file: str, shape: Shape, returns: dict[str, str], places: dict[str, list[str]]
    ) -> None:
        self.file, self.shape, self.returns, self.found = file, shape, returns, places

    def block(self, body: Iterable[ast.AST], names: dict[str, Value]) -> None:
        for node in body:
            self.visit(node, names)

    def visit(self, node: ast.AST, names: dict[str, Value]) -> Value:
        """Follows one node; its value where that is known."""
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                inner = names | self._parameters(node.args)
                body = node.body if isinstance(node.body, list) else [node.body]
                self.block(body, inner)
            case ast.Name(ctx=ast.Load()):
                return names.get(node.id)
            case ast.Constant(value=str()):
                return (node.value,)
            case ast.Tuple() | ast.List() | ast.Set():
                values = [self.visit(item, names) for item in node.elts]
                if values and all(isinstance(v, tuple) for v in values):
                    return tuple(text for v in values if isinstance(v, tuple) for text in v)
            case ast.Attribute():
                return self._attribute(node, names)
            case ast.Call():
                return self._call(node, names)
            case ast.Assign() | ast.AnnAssign() | ast.NamedExpr():
                return self._assign(node, names)
            case ast.For() | ast.comprehension():
                self._bind(node.target, self.visit(node.iter, names), names)
                inner_body = node.body + node.orelse if isinstance(node, ast.For) else node.ifs
                self.block(inner_body, names)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                inner = dict(names)
                self.block(node.generators, inner)
                parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
                self.block(parts, inner)
            case ast.IfExp():
                values = [self.visit(x, names) for x in (node.test, node.body, node.orelse)]
                return next((v for v in values[1:] if v is not None), None)
            case _:
                self.block(ast.iter_child_nodes(node), names)
        return None

    def _parameters(self, arguments: ast.arguments) -> dict[str, Value]:
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        values: dict[str, Value] = {}
        for one in every:
            kind = ast.unparse(one.annotation).strip("'\"") if one.annotation else ""
            values[one.arg] = self.shape.classes.get(kind)
        return values

    def _attribute(self, node: ast.Attribute, names: dict[str, Value]) -> Value:
        base = self.visit(node.value, names)
        if not isinstance(base, str):
            return ROOT if node.attr == "config" else None
        path = f"{base}.{node.attr}".lstrip(".")
        if path in self.shape.sections:
            return path
        if isinstance(node.ctx, ast.Load):
            for field in self.shape.properties.get((base, node.attr), [path]):
                self._note(field, node)
        return None

    def _call(self, node: ast.Call, names: dict[str, Value]) -> Value:
        owner = self.visit(node.func, names) if isinstance(node.func, ast.Name) else None
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        if isinstance(node.func, ast.Attribute):
            owner, called = self.visit(node.func.value, names), node.func.attr
        arguments = [self.visit(argument, names) for argument in node.args]
        for keyword in node.keywords:
            value = self.visit(keyword.value, names)
            if keyword.arg is None and isinstance(value, Dump):
                for field in value.fields:
                    self._note(field, node)
        if isinstance(owner, str) and called == "model_copy":
            return owner
        if isinstance(owner, str) and called == "model_dump":
            return self._dump(owner, node, names)
        if called == "getattr" and len(arguments) > 1 and isinstance(arguments[0], str):
            for name in arguments[1] if isinstance(arguments[1], tuple) else ():
                self._note(f"{arguments[0]}.{name}", node)
        if called in ("set", "tuple", "list", "frozenset", "sorted") and len(arguments) == 1:
            return arguments[0]
        return self.returns.get(called)

    def _dump(self, section: str, node: ast.Call, names: dict[str, Value]) -> Dump:
        options = {k.arg: self.visit(k.value, names) for k in node.keywords if k.arg}
        leaves = [f for f in sorted(self.shape.fields) if f.startswith(f"{section}.")]
        for option, inside in (("include", True), ("exclude", False)):
            if option in options:
                said = options[option]
                if not isinstance(said, tuple):
                    return Dump(())  # not known, so nothing is taken for read
                leaves = [f for f in leaves if (f.partition(".")[2] in said) is inside]
        return Dump(tuple(leaves))

    def _assign(
        self, node: ast.Assign | ast.AnnAssign | ast.NamedExpr, names: dict[str, Value]
    ) -> Value:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, item in zip(target.elts, node.value.elts, strict=False):
                    self._bind(one, self.visit(item, names), names)
                return None
        value = self.visit(node.value, names) if node.value else None
        for target in targets:
            self._bind(target, value, names)
        return value

    def _bind(self, target: ast.AST, value: Value, names: dict[str, Value]) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = value
        elif isinstance(target, ast.Tuple):
            for item in target.elts:
                self._bind(item, None, names)

    def _note(self, field: str, node: ast.AST) -> None:
        if field in self.shape.fields:
            self.found.setdefault(field, []).append(f"{self.file}:{getattr(node, 'lineno', 0)}")
