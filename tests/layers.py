"""Who may import whom: a row for each room of the house, and what holds sources against it.

A module may use its own room and what the room's row names. The rows stand in order, and a row
names only rooms of rows before it: so no import goes upwards, and none can close a circle.
`inside` may be imported in functions only (or for type checking): those imports cost and couple
nothing until the function runs. Patterns are matched against names without `pipeline.`; the first
row that fits a module is its row, so a module that must stay lighter than its room has a row
before it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """What the modules of one row may import, of ours and of others."""

    modules: list[str]
    ours: list[str]
    inside: list[str]
    others: list[str]
    others_inside: list[str]


def row(
    modules: str, ours: str = "", inside: str = "", others: str = "", others_inside: str = ""
) -> Row:
    """A row; names are separated by blanks, and `room` stands for `room` and `room.*`."""
    lists = [[p for x in names.split() for p in _patterns(x)] for names in (modules, ours, inside)]
    return Row(*lists, others.split(), others_inside.split())


def _patterns(name: str) -> list[str]:
    return [name] if name in LOOSE or "." in name else [name, f"{name}.*"]


LOOSE = [
    "__init__",
    "api",
    "context",
    "entry",
    "environment",
    "errors",
    "heartbeat",
    "job",
    "live",
    "log",
    "rounds",
    "schedule",
    "uri",
]
TABLE = [
    # the ground floor: what everything may use
    row("schedule uri environment heartbeat __init__"),
    row("errors log", "uri heartbeat"),
    row("live", "heartbeat log", others_inside="rich"),
    # what a recipe says, and what follows from it; no torch, no Ray
    row("config", "errors uri", others="pydantic yaml"),
    row("plan", "config errors schedule", others="pydantic"),
    row("commands", "config errors"),
    # images and views: pure functions of bytes, pixels and keys
    row("images", "errors", others="numpy PIL simplejpeg",
        others_inside="torch torchvision pydicom pillow_heif"),
    row("views.draws views.masks", "errors views.draws", others="numpy"),
    row("views", "errors", others="numpy torch"),
    row("storage", "environment errors images uri", others="pyarrow"),
    row("driver", "environment errors heartbeat plan", "config", others_inside="ray"),
    row("shards", "errors images storage uri views", others="numpy pyarrow"),
    row("pack.pack", "errors images log pack shards storage uri", others_inside="ray"),
    row("pack", "errors images shards storage uri", others="numpy PIL pyarrow",
        others_inside="skimage sklearn"),
    row("stream", "driver errors images plan.nodes plan.streams shards storage uri views",
        others="numpy pyarrow", others_inside="ray torch"),
    # maths: no Ray, no config
    row("loss.row_kernels loss.target_kernels", "loss.prototypes loss.row_kernels loss.target",
        others="torch triton"),
    row("loss", "errors", others="torch", others_inside="triton"),
    row("model", "errors images schedule storage views", others="torch safetensors",
        others_inside="onnx onnxruntime timm transformers"),
    row("evaluate.sets", "config errors evaluate shards"),
    row("evaluate", "errors images loss.collectives model shards uri views", others="numpy torch"),
    row("track.embedder", "environment errors uri", "images model views",
        "", "mlflow torch numpy pandas PIL"),
    row("track", "environment errors heartbeat log uri", "", "", "mlflow PIL psutil pynvml"),
    row("report", "track uri", others_inside="PIL jinja2"),
    row("use", "errors evaluate images model report shards storage uri views",
        others="numpy PIL pyarrow torch"),
    row("train.speed.*", "errors plan.plan storage train.speed.* uri views", others="torch"),
    row("train.parallel.*", "errors loss.collectives model train.parallel.*", others="torch"),
    row("train.distil.features", "errors loss model", others="torch"),
    row("train.distil.source", "images model"),
    row("train.step train.objective",
        "errors loss model schedule train.distil.features train.objective train.parallel.* "
        "train.speed.parts train.step views",
        others="torch"),
    row("train.checkpoint.*", "errors model.low_rank storage train.checkpoint.* uri",
        others="numpy torch"),
    row("train.tune.*", "config errors model train.parallel.* train.tune.*", others="torch"),
    row("train.build train.estimate train.start",
        "config errors evaluate images loss model plan schedule shards storage train uri "
        "views", others="torch"),
    row("train.rank_zero", "driver errors evaluate heartbeat loss model plan schedule shards "
        "storage stream train uri views", "track.tracker", "torch ray", "psutil"),
    row("train", "config driver errors evaluate heartbeat images log loss model plan schedule "
        "shards storage stream uri views", others="torch ray", others_inside="yaml"),
    # curation: tasks on Ray over parquet; what they compute is plain numpy
    row("curate.rows.exact", others="numpy", others_inside="torch"),
    row("curate.rows.*", "curate.rows.* errors images shards storage uri views",
        others="numpy pyarrow"),
    row("curate.steps.tasks", "errors heartbeat storage uri", others="pyarrow",
        others_inside="ray"),
    row("curate.steps.*", "curate.rows.* curate.steps.* storage uri", others="numpy pyarrow"),
    row("curate.images.*", "curate.images.* curate.rows.* curate.steps.* images shards storage "
        "uri views", others="numpy PIL pyarrow"),
    # what makes vectors; its descriptor is what a curation sees of an image
    row("embed", "embed errors heartbeat images log shards storage stream.rows uri",
        "curate.images.* evaluate model plan train views", "numpy pyarrow",
        "ray torch timm google onnx onnxruntime"),
    row("curate.embed.*", "curate.embed.* curate.images.* curate.rows.* curate.steps.* embed "
        "errors images shards storage uri", "", "numpy pyarrow", "ray"),
    row("curate.look.*", "curate.look.* curate.images.* curate.rows.* curate.steps.* images shards "
        "storage uri", others="numpy PIL pyarrow scipy"),
    row("curate.threshold.*", "curate.threshold.* curate.embed.* curate.images.* curate.look.* "
        "curate.rows.* curate.steps.* embed images uri views", others="numpy PIL pyarrow"),
    row("curate.copies.*", "curate.copies.* curate.look.* curate.rows.* curate.steps.* errors "
        "storage uri", others="numpy pyarrow", others_inside="ray scipy torch"),
    row("curate.choose.*", "curate.choose.* curate.rows.* curate.steps.* errors storage uri",
        others="numpy pyarrow", others_inside="scipy torch"),
    row("curate.decide.*", "curate.decide.* curate.rows.* curate.steps.* errors images pack shards "
        "storage uri", others="numpy pyarrow", others_inside="PIL"),
    row("curate.report.*", "curate.choose.* curate.report.* curate.rows.* curate.steps.* errors "
        "report storage uri views", others="numpy PIL pyarrow", others_inside="umap"),
    row("search", "curate.report.* curate.rows.* embed errors heartbeat images pack report "
        "shards storage uri", others="numpy pyarrow", others_inside="faiss"),
    row("card", "config curate.threshold.* embed errors evaluate heartbeat images model report "
        "search shards storage uri use views", others="numpy pyarrow",
        others_inside="PIL ray torch"),
    row("adapt", "adapt card config embed errors evaluate images.preprocessing images.value_range "
        "storage.places uri", "model plan train", "yaml"),
    row("finetune.settings", "schedule"),
    row("finetune", "config driver errors evaluate heartbeat images log loss model plan schedule "
        "shards storage stream.order train.checkpoint.* train.speed.bottleneck uri views",
        others="numpy pyarrow torch", others_inside="ray timm transformers"),
    row("run_report", "card config errors report storage track uri", others_inside="numpy PIL"),
    # what runs: config in, files out
    row("context", "config driver errors pack plan shards storage uri", others_inside="torch"),
    row("curate", "config context curate.* embed errors images shards storage train uri", "",
        "numpy PIL", "ray"),
    row("serve", "config curate.choose.* curate.images.* curate.rows.* driver.ray_internals embed "
        "errors images search uri views", "evaluate use", "numpy PIL starlette", "ray torch"),
    row("stages", "adapt card config context curate driver embed environment errors evaluate "
        "finetune heartbeat images model pack plan report run_report search serve shards storage "
        "stream track train uri use views",
        others="yaml", others_inside="ray torch pyarrow"),
    row("rounds", "card config context curate errors stages storage train uri"),
    row("doctor", "adapt card config context curate driver embed errors evaluate heartbeat images "
        "model plan rounds shards stages storage stream track.server train uri",
        others_inside="packaging psutil ray torch"),
    row("start", "adapt.recipe config context doctor driver.cluster errors heartbeat images "
        "model.pair pack plan shards.row_group stages storage train uri",
        others_inside="ray torch"),
    # from Python: what a run is made of, one call each, and all of it as one call
    row("api api.networks api.losses api.images api.distil api.start api.train api.finetune "
        "api.chosen_recipe api.evaluate",
        "api.* config.sizes embed errors evaluate images loss model schedule "
        "search.search shards.columns shards.shard_set stream.decoder stream.reader train.step "
        "train.distil.features train.objective train.step uri use views",
        "card config.load log rounds stages start storage", "numpy PIL torch"),
    row("job", "commands config environment errors heartbeat live log",
        "doctor rounds stages start uri"),
    row("entry", "", "job"),
]  # fmt: skip
MODULES, LINES, PARAMETERS = 15, 350, 7  # at most: of a folder, of a module, of a function
PACKAGES = {name.removesuffix(".*") for r in TABLE for name in r.modules if name.endswith(".*")}
JOBS = row("*", "entry")


@dataclass(frozen=True)
class Import:
    """One imported name: `pipeline.views.crops` or `torch.nn`, and where it stands."""

    name: str
    line: int
    top_level: bool


def imports_of(source: str, modules: Iterable[str] = ()) -> list[Import]:
    """The imports in a source. `from pipeline.views import crops` is one of `pipeline.views.crops`.

    Args:
        source: Python text.
        modules: full names of our modules, to tell a module from a name inside one.
    """
    known = set(modules)
    found: list[Import] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.append(Import(full if full in known else module, node.lineno, top))
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in ("import_module", "__import__"):
                what = node.args[0] if node.args else None
                name = what.value if isinstance(what, ast.Constant) else "<computed>"
                found.append(Import(str(name), node.lineno, top))
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not function and not typing)

    visit(ast.parse(source), True)
    return found


def rows_of(module: str, table: Iterable[Row] = TABLE) -> Row | None:
    """The first row that fits a module (`views.crops`)."""
    if module in PACKAGES:  # its `__init__` may hand on what it holds
        return Row([module], [f"{module}.*"], [], [], [])
    return next((r for r in table if any(fnmatch(module, p) for p in r.modules)), None)


def violations(module: str, found: Iterable[Import], allowed: Row | None) -> list[str]:
    """What a module imports and must not, one sentence each."""
    if allowed is None:
        return [f"{module}: no row of the table in tests/layers.py fits it"]
    problems = []
    for one in found:
        place = f"{module}:{one.line}"
        top, _, rest = one.name.partition(".")
        if one.name.startswith((".", "<")):
            problems.append(f"{place}: imports {one.name}; write the full name")
        elif top in sys.stdlib_module_names:
            continue
        elif top == "jobs":
            problems.append(f"{place}: nothing imports jobs")
        elif top == "pipeline":
            patterns = allowed.ours + ([] if one.top_level else allowed.inside)
            if _room(rest) == _room(module) and not _alone(allowed):
                continue
            if rest and not any(fnmatch(rest, pattern) for pattern in patterns):
                how = _how(any(fnmatch(rest, p) for p in allowed.inside))
                problems.append(f"{place}: must not import {one.name}{how}")
        elif top not in allowed.others + ([] if one.top_level else allowed.others_inside):
            how = _how(top in allowed.others_inside)
            problems.append(f"{place}: must not import {top}{how}")
    return problems


def cycles(graph: Mapping[str, set[str]]) -> list[str]:
    """The first circle of top-level imports, if any."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def module_name(path: Path, root: Path) -> str:
    """`views.crops` for `pipeline/views/crops.py`; a package is called like its folder."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts = parts[:-1] or ["__init__"]
    return ".".join(parts)


def _room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "curate" and len(parts) > 2 else 1])


def _alone(allowed: Row) -> bool:
    """Whether the row is of single modules, which may not use all of their room."""
    return not any(pattern.endswith("*") for pattern in allowed.modules)


def upward(table: Iterable[Row] = TABLE) -> list[str]:
    """What a row names that no row before it has, and so would be an arrow upwards."""
    known: list[str] = []
    problems = []
    for each in table:
        known += each.modules
        rooms = {p.removesuffix(".*") for p in known} | {p.split(".")[0] for p in known}
        for name in [*each.ours, *each.inside]:
            room = name.removesuffix(".*") if name.startswith("curate") else name.split(".")[0]
            if room not in rooms:
                problems.append(f"{each.modules[0]} names {name}, which stands below it")
    return problems


def oversized(root: Path) -> list[str]:
    """Folders and modules below `root` that are larger than one reads in one go, and functions
    that take more than one keeps in mind; one sentence each.
    """
    problems = []
    folders = [root, *sorted(x for x in root.rglob("*") if x.is_dir())]
    for folder in folders:
        modules = sorted(folder.glob("*.py"))
        if len(modules) > MODULES:
            problems.append(f"{folder.relative_to(root.parent)}: {len(modules)} modules")
        for module in modules:
            source, name = module.read_text(), module.relative_to(root.parent)
            if (lines := len(source.splitlines())) > LINES:
                problems.append(f"{name}: {lines} lines")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    problems += _too_many(node, str(name))
    return problems


def _too_many(function: ast.FunctionDef | ast.AsyncFunctionDef, module: str) -> list[str]:
    if any("triton.jit" in ast.unparse(x) for x in function.decorator_list):
        return []  # pointers and sizes of a kernel cannot be put into an object
    every = function.args
    names = {x.arg for x in (*every.posonlyargs, *every.args, *every.kwonlyargs)}
    count = len(names - {"self", "cls"})
    place = f"{module}:{function.lineno}"
    return [f"{place}: {function.name} has {count} parameters"] if count > PARAMETERS else []


def _how(inside: bool) -> str:
    return " at the top of the file, only inside a function" if inside else ""
