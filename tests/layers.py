"""Who may import whom: the table of the design, and the rules that hold sources against it.

A module may use what its row names. `inside` may be imported in functions only (or for type
checking): those imports cost and couple nothing until the function runs. Patterns are matched
against names without `pipeline.`; the first row that fits a module is its row.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

LEAVES = [
    "data.schema", "data.columns", "data.row_group", "data.retry", "data.storage", "data.transfer",
    "data.decode", "data.crops", "data.photometric", "data.colour", "data.colour_crop",
    "data.colour_fused", "data.compiled", "data.draws", "data.masks", "data.batch", "data.order",
    "data.bad_image", "data.jpeg", "data.npy", "data.pictures", "data.rows", "data.kinds",
    "data.patterns", "data.classes", "data.label_column", "data.overlap", "data.extras",
    "data.deep", "data.value_range", "data.set_range", "data.dicom",
]  # fmt: skip
PACKING = [
    *("data.listing", "data.tar", "data.archives", "data.labels", "data.sources", "data.items"),
    *("data.runs", "data.merge", "data.ledger", "data.claim", "data.once"),
]
MATHS = ["errors", "schedule", "uri", "model.*", "loss.*", *LEAVES]


@dataclass(frozen=True)
class Row:
    """What the modules of one row may import, of ours and of others."""

    modules: list[str]
    ours: list[str]
    inside: list[str]
    others: list[str]
    others_inside: list[str]


def row(
    modules: str | list[str],
    ours: str | list[str] = "",
    inside: str | list[str] = "",
    others: str = "",
    others_inside: str = "",
) -> Row:
    """A row; names are separated by blanks."""
    lists = [x if isinstance(x, list) else x.split() for x in (modules, ours, inside)]
    return Row(*lists, others.split(), others_inside.split())


TABLE = [
    # the small things that everything may use
    row("schedule uri environment heartbeat __init__"),
    row("errors log", "uri heartbeat"),
    row("curation", inside="config"),
    row("config", "errors curation uri model.sizes", others="pydantic"),
    row("recipe", "errors", others="yaml"),
    row("overrides", "curation errors config recipe uri", others="pydantic"),
    row("files", "environment errors uri"),
    row("mirror", "errors files uri data.retry data.storage data.transfer"),
    row("placement"),
    row("arrangement", "errors config placement", others="pydantic"),
    row("plan", "arrangement errors config overrides placement schedule", others="pydantic"),
    row("control", others_inside="ray"),
    row("ending", "control"),
    row("ray_start", "errors", others_inside="ray"),
    row(
        "cluster",
        "ending environment errors heartbeat placement ray_start",
        "arrangement config",
        others_inside="ray",
    ),
    row("job", "config environment errors heartbeat log overrides", "stages stages.*"),
    # data: what CPU tasks and batches are made of, then packing, then what runs on Ray
    row("data.draws data.masks data.order", "errors data.draws", others="numpy"),
    row(
        "data.schema data.columns data.row_group data.retry data.rows data.storage data.transfer "
        "data.classes data.label_column data.overlap data.extras",
        ["errors", "uri", *LEAVES],
        others="numpy pyarrow",
    ),
    row("data.jpeg", others="numpy simplejpeg"),
    row(
        "data.decode data.bad_image data.npy data.pictures data.deep data.dicom data.value_range",
        "errors data.bad_image data.jpeg data.npy data.pictures data.deep data.dicom "
        "data.value_range",
        others="numpy PIL",
        others_inside="torch torchvision pydicom pillow_heif",
    ),
    row(LEAVES, ["errors", "schedule", *LEAVES], others="numpy torch"),
    row("data.demo", "errors", others="numpy PIL", others_inside="skimage sklearn"),
    row(PACKING, ["errors", "uri", *LEAVES, *PACKING], others="numpy pyarrow"),
    row("data.pack", ["errors", "uri", *LEAVES, *PACKING], others_inside="ray"),
    row("data.reading", ["errors", *LEAVES], others="numpy pyarrow"),
    row(
        "data.stream data.feeder data.segments",
        ["errors", "control", "data.reading", "data.segments", *LEAVES],
        "cluster data.read_ahead data.stream",
        others="numpy pyarrow",
        others_inside="ray torch",
    ),
    row("data.read_ahead", others="ray"),
    row("data.probe", ["errors", "data.reading", "data.stream", *LEAVES], others="numpy"),
    # maths: no framework, no config
    row("model.sizes"),
    row("model.formats", "data.crops data.value_range model.*", others="torch"),
    row(
        "model.weights model.foreign_weights",
        "errors files data.value_range model.*",
        others="torch safetensors",
        others_inside="timm transformers",
    ),
    row(
        "model.*",
        "errors schedule model.*",
        others="torch safetensors",
        others_inside="timm transformers",
    ),
    row("loss.*", "errors schedule loss.*", others="torch"),
    row("evaluate.*", ["errors", "uri", "model.*", "evaluate.*", *LEAVES], others="numpy torch"),
    row("train.clock"),
    row("train.limits", "data.batch"),
    row("train.cost", others="torch"),
    row("train.step train.objective", [*MATHS, "train.objective"], others="torch"),
    # from here on: config, files, Ray
    row(
        "api",
        [*MATHS, "train.objective", "train.step"],
        others="torch",
    ),
    row("train.build", [*MATHS, "config", "plan", "train.cost", "train.step"], others="torch"),
    row(
        "train.state train.remote_state",
        "errors uri data.storage data.transfer train.remote_state",
        others="torch",
    ),
    row(
        "train.start",
        [*MATHS, "config", "plan", "train.build", "train.objective", "train.state"]
        + ["train.remote_state"],
        others="torch",
    ),
    row("train.evaluation_sets", ["config", "evaluate.labels", *LEAVES]),
    row("train.trainee", [*MATHS, "train.objective"], others="torch"),
    row("train.bad_table", ["errors", "uri", *LEAVES], others="pyarrow"),
    row(
        "train.chief",
        [*MATHS, "plan", "control", "evaluate.*", "train.*"],
        # made on rank 0 from the settings that the driver hands down
        "track.tracker track.remote",
        others="torch ray",
        others_inside="psutil",
    ),
    row(
        "train.evaluations train.free train.loop train.run train.scaling",
        [*MATHS, "arrangement", "config", "plan", "placement", "files", "log", "control"]
        + ["cluster", "evaluate.*", "heartbeat"]
        + ["data.reading", "data.stream", "data.feeder", "train.*"],
        others="torch ray",
        others_inside="yaml",
    ),
    # curation: tasks on Ray over parquet; what they compute is plain numpy
    row("curate.exact", others="numpy", others_inside="torch"),
    row(
        "curate.shards curate.shard_*",
        [
            "errors",
            "files",
            "uri",
            "curate.*",
            "data.merge",
            "data.ledger",
            "data.claim",
            "data.sources",
            *LEAVES,
        ],
        others="numpy pyarrow",
        others_inside="PIL",
    ),
    row(
        "curate.report* curate.gallery",
        ["errors", "uri", "curate.*", "track.charts", "track.gallery", "track.matrix"]
        + ["track.plane", "track.report", *LEAVES],
        others="numpy pyarrow PIL",
        others_inside="umap",
    ),
    row(
        "curate.*",
        ["errors", "files", "heartbeat", "uri", "evaluate.*", "model.*", "curate.*", *LEAVES],
        others="numpy pyarrow PIL scipy",
        others_inside="ray torch onnxruntime sklearn umap",
    ),
    row(
        "track.embedder",
        "environment errors log uri track.*",
        "model.* data.*",
        "",
        "mlflow torch numpy pandas",
    ),
    row(
        "track.*",
        "environment errors heartbeat log uri track.*",
        "",
        "",
        "mlflow PIL psutil pynvml",
    ),
    row("stages.curate_query", ["*"], "", "numpy PIL"),
    row("stages.*", ["*"], "", "yaml", "ray torch pyarrow"),
]
# An `__init__` may hand on what its package holds, and nothing else.
PACKAGES = ["data", "curate", "model", "loss", "train", "evaluate", "track", "stages"]
JOBS = row("*", "job", "environment log errors uri stages.sync")


@dataclass(frozen=True)
class Import:
    """One imported name: `pipeline.data.crops` or `torch.nn`, and where it stands."""

    name: str
    line: int
    top_level: bool


def imports_of(source: str, modules: Iterable[str] = ()) -> list[Import]:
    """The imports in a source. `from pipeline.data import crops` is one of `pipeline.data.crops`.

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
    """The first row that fits a module (`data.crops`)."""
    if module in PACKAGES:
        return row(module, f"{module}.*")
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
    """`data.crops` for `pipeline/data/crops.py`; a package is called like its folder."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts = parts[:-1] or ["__init__"]
    return ".".join(parts)


def _how(inside: bool) -> str:
    return " at the top of the file, only inside a function" if inside else ""
