"""A module made of its text, as a plan, a checkpoint or an export has it.

Workers, evaluations and later jobs make the module of an encoder from that text, whatever lies in
their own folders. What the text does not hold is imported as always.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, ModuleType

from pipeline.errors import PipelineError, one_line, shortened
from pipeline.model.encoders.source import Name, above, digest_of, installed

_LOCK = threading.RLock()
_MODULES: dict[str, ModuleType] = {}  # by the digest of the text


def make_module(name: Name, files: Mapping[str, str]) -> ModuleType:
    """The module from its text, once in a process; modules of the same names that were imported
    from elsewhere stay as they are.

    Raises:
        PipelineError: the text is no Python, or fails while it is imported.
    """
    key = f"{name.module} {digest_of(files)}"
    with _LOCK:
        if key not in _MODULES:
            _MODULES[key] = _made(name, files)
        return _MODULES[key]


def _made(name: Name, files: Mapping[str, str]) -> ModuleType:
    texts = {_module_of(file): (file, text) for file, text in files.items()}
    top = name.module.partition(".")[0]
    if top not in texts and _library(top):  # one file of a library
        here = _library(name.module)
        if here is not None and here.read_text(encoding="utf-8") == texts[name.module][1]:
            return _imported(name)  # twice it may not bear: some enter themselves into lists
    else:
        for package in {package for module in texts for package in above(module)} - texts.keys():
            texts[package] = (f"{package.replace('.', '/')}/__init__.py", "")
    before = {each: sys.modules.pop(each) for each in texts if each in sys.modules}
    finder = _Texts(texts)
    sys.meta_path.insert(0, finder)
    try:
        module = _imported(name)
        for each in texts.keys() - sys.modules.keys():
            # for imports inside functions, which come when the text is no longer looked at; one
            # that fails here fails there too, if it is ever called
            with suppress(Exception, SystemExit):
                pkgutil.resolve_name(f"{each}:")
        return module
    except PipelineError:
        for each in texts:
            sys.modules.pop(each, None)
        raise
    finally:
        sys.meta_path.remove(finder)
        for each, earlier in before.items():
            sys.modules[each] = earlier
            package, _, last = each.rpartition(".")
            if package in sys.modules:
                setattr(sys.modules[package], last, earlier)


def _imported(name: Name) -> ModuleType:
    try:
        module: ModuleType = pkgutil.resolve_name(f"{name.module}:")  # the module itself
    except Exception as error:
        raise _unimportable(name, error) from error
    return module


def _library(module: str) -> Path | None:
    """The file of a module that is installed here or of this project; None for any other."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    path = Path(spec.origin) if spec is not None and spec.origin else None
    return path if path is not None and path.suffix == ".py" and installed(path) else None


def _unimportable(name: Name, error: Exception) -> PipelineError:
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, SyntaxError):
        return PipelineError(
            f"model.encoder={name}: {error.filename} line {error.lineno} is no Python: {error.msg}",
            "mend that line",
        )
    why = f"{type(error).__name__}: {shortened(one_line(error))}"
    if isinstance(error, ImportError):
        return PipelineError(
            f"model.encoder={name} cannot be imported: {why}",
            "install what it imports, or put it beside the encoder; files are taken along, "
            "packages are not",
        )
    return PipelineError(
        f"model.encoder={name} fails while it is imported: {why}", "mend the module"
    )


def _module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class _Texts(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads modules of texts: `(file, text)` by the module's name."""

    def __init__(self, texts: Mapping[str, tuple[str, str]]) -> None:
        self.texts = texts

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.texts:
            return None
        file = self.texts[fullname][0]
        return importlib.machinery.ModuleSpec(
            fullname, self, origin=file, is_package=file.endswith("/__init__.py")
        )

    def get_source(self, fullname: str) -> str:
        return self.texts[fullname][1]

    def get_code(self, fullname: str) -> CodeType:
        file, text = self.texts[fullname]
        return self.source_to_code(text, file)

    def is_package(self, fullname: str) -> bool:
        return self.texts[fullname][0].endswith("/__init__.py")
