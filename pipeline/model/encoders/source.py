"""The text of a module that makes an encoder: its name, its files, and whether they are as before.

`model.encoder=module:<package.module>:<factory>` names a module of Python. Its text is read once,
where the job is started, with the text of what it imports from its own folder; from then on it
travels with the plan (`made.py`). What is installed there (torch, timm) is imported as always.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.errors import PipelineError, one_line, shortened

log = logging.getLogger("pipeline.model")

PREFIX = "module:"
CODE = "encoder"  # folder of a run and of weights with the text of a module
FILES, BYTES = 100, 2**20  # at most of one encoder
REFUSE = "RAYDINO_ENCODER_CODE"  # "never": the code of runs and exports is not run
PROJECT = Path(__file__).resolve().parents[2]  # the package `pipeline`


@dataclass(frozen=True)
class Name:
    """What `model.encoder=module:nets.cnn:small` says: module `nets.cnn`, factory `small`."""

    module: str
    factory: str

    @classmethod
    def of(cls, encoder: str) -> Name:
        """Parts of a name, with or without `module:` before it.

        Raises:
            PipelineError: it has other parts.
        """
        module, colon, factory = encoder.removeprefix(PREFIX).rpartition(":")
        names = [*module.split("."), factory]
        if not colon or not all(name.isidentifier() for name in names):
            raise PipelineError(
                f"model.encoder={encoder} names no module and factory",
                "write module:<package.module>:<factory>, e.g. module:mynets.cnn:small for the "
                "function small in mynets/cnn.py",
            )
        return cls(module, factory)

    def __str__(self) -> str:
        return f"{PREFIX}{self.module}:{self.factory}"


# ---- From the files of this machine.


def read_source(name: Name) -> dict[str, str]:
    """The text of a module by the names of its files (`nets/cnn.py`), with the text of what it
    imports from the same folder. Of a module that is installed its own file alone.

    Looked for in the folder where the job is started, then where Python looks.

    Raises:
        PipelineError: there is no such module, or its text cannot be kept.
    """
    root, path = _place(name)
    if root is None or installed(path):
        top = path.parents[len(name.module.split(".")) - (path.name != "__init__.py")]
        return {path.relative_to(top).as_posix(): _text(path, name)}
    files: dict[str, str] = {}
    waiting = [(name.module, path)]
    while waiting:
        module, path = waiting.pop()
        key = path.relative_to(root).as_posix()
        if key in files:
            continue
        files[key] = _text(path, name)
        if len(files) > FILES or sum(map(len, files.values())) > BYTES:
            raise PipelineError(
                f"model.encoder={name} imports more than {FILES} files or {BYTES >> 20} MiB from "
                f"{root}: all of them are kept with the run",
                "put what the encoder needs into few files, or install the package",
            )
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for imported in [*above(module), *_imports(files[key], package)]:
            other = _file(root, imported)
            if other is not None and not installed(other):
                waiting.append((imported, other))
    return dict(sorted(files.items()))


def _place(name: Name) -> tuple[Path | None, Path]:
    """Folder below which the module's packages stand, if it is an ordinary one, and its file."""
    here = Path.cwd()
    for place in dict.fromkeys([here, *(here / entry for entry in sys.path)]):
        if (path := _file(place, name.module)) is not None:
            return place, path
    try:
        spec = importlib.util.find_spec(name.module)
    except ImportError:
        spec = None
    except Exception as error:  # of a package around it, which is run to find it
        raise PipelineError(
            f"model.encoder={name}: a package around it cannot be imported: "
            f"{type(error).__name__}: {shortened(one_line(error))}",
            "mend it, or name another module",
        ) from error
    if spec is None:
        raise PipelineError(
            f"model.encoder={name}: there is no module {name.module}",
            f"put {name.module.replace('.', '/')}.py into {here}, where the job is started, or "
            "into a folder of PYTHONPATH",
        )
    if not spec.origin or not spec.origin.endswith(".py"):
        raise PipelineError(
            f"model.encoder={name}: {name.module} has no file of Python text, which a run keeps",
            "name a module that is one .py file",
        )
    return None, Path(spec.origin)


def _file(root: Path, module: str) -> Path | None:
    place = root.joinpath(*module.split("."))
    for path in (place / "__init__.py", place.with_name(f"{place.name}.py")):
        if path.is_file():
            return path
    return None


@cache
def _libraries() -> tuple[Path, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple(Path(sysconfig.get_path(name)).resolve() for name in names)


def installed(path: Path) -> bool:
    """Whether a file is the same on all machines of a job: of a library, or of this project."""
    file = path.resolve()
    return file.is_relative_to(PROJECT) or any(file.is_relative_to(x) for x in _libraries())


def _text(path: Path, name: Name) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise PipelineError(
            f"model.encoder={name}: {path} cannot be read as text: {one_line(error)}",
            "check the file; it is kept with the run as UTF-8",
        ) from error


def above(module: str) -> Iterator[str]:
    """The packages around a module."""
    while module := module.rpartition(".")[0]:
        yield module


def _imports(text: str, package: str) -> list[str]:
    """Names that a text may import as modules."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []  # said when it is made a module
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join([*base, node.module or ""]).strip(".") if node.level else node.module
            names += [str(start), *(f"{start}.{alias.name}".strip(".") for alias in node.names)]
    return [name for each in names for name in (each, *above(each))]


# ---- A run's text, and the files of this machine.


def digest_of(files: Mapping[str, str]) -> str:
    """16 hex digits of the text of all files."""
    text = json.dumps(sorted(files.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def differing(name: Name, files: Mapping[str, str]) -> list[str] | None:
    """Files whose text is another one here than in `files`; None: there is no such module here."""
    try:
        here = read_source(name)
    except PipelineError:
        return None
    return sorted(file for file in {*files, *here} if files.get(file) != here.get(file))


def read_kept(folder: Path) -> dict[str, str]:
    """The text that an export wrote into a folder, by the names of the files; {} where none is."""
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }


@cache
def _say(text: str) -> None:
    log.info("%s", text)


def from_copy(name: Name, files: Mapping[str, str], owner: str) -> None:
    """Said once where the text of a run or of weights is used and this machine has another one.

    Args:
        name: of the encoder.
        files: its text.
        owner: whose it is, for the line: `runs/a`.

    Raises:
        PipelineError: this machine runs no such code (`RAYDINO_ENCODER_CODE=never`).
    """
    differ = differing(name, files)
    if differ == []:
        return
    if os.environ.get(REFUSE) == "never":
        raise PipelineError(
            f"{owner} has the code of its encoder {name} with it, and {REFUSE}=never runs no code "
            "but that of this machine",
            f"read that code, then unset {REFUSE}",
        )
    why = "is not here" if differ is None else f"is another one here ({', '.join(differ)})"
    _say(f"encoder     {name} from the text kept in {owner}: its module {why}")
