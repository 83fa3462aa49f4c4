"""Checks cluster files and manifests without a network and without an account.

python cluster/check.py                              all files of this folder
python cluster/check.py my-cluster.yaml              one of yours
python cluster/check.py --crd raycluster-crd.yaml    against the operator's own definition as well

Cluster files are held against Ray's schema, manifests against those of KubeRay and Kubernetes, and
all of them against the rules of this project: token authentication, nothing open, no secret in a
file, pinned versions, no work on the head, groups for decoding and training, shared storage.
Runtime environments of jobs must leave time for a checkpoint. Exit code 1 where something is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.checks import text
from cluster.checks.launch import launch_problems
from cluster.checks.manifests import manifest_problems
from cluster.checks.runtime import is_runtime_env, runtime_problems

FOLDER = Path(__file__).resolve().parent
CHECKED = ("*.yaml", "kuberay/*.yaml", "*.sh", "Dockerfile")


class _Loader(yaml.SafeLoader):
    """Reads as Ray and Kubernetes do, but refuses a key that stands twice: they keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(f"{name} stands twice, on lines {lines[name]} and {line}")
            lines[name] = line
        return node


def problems(path: Path, definitions: Sequence[dict[str, Any]] = ()) -> list[str]:
    """What is wrong with a file, one sentence each.

    Args:
        path: a cluster file, a manifest of any number of objects, a runtime environment, a shell
            script or a Dockerfile.
        definitions: CustomResourceDefinitions of KubeRay's operator.
    """
    try:
        content = path.read_text()
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]
    found = text.secret_lines(content)
    if path.suffix == ".sh":
        return found + text.script_problems(content)
    if path.name.startswith("Dockerfile"):
        return found + text.dockerfile_problems(content)
    try:
        documents = [one for one in yaml.load_all(content, _Loader) if one is not None]
    except yaml.YAMLError as error:
        return [*found, f"is no YAML: {' '.join(str(error).split())[:200]}"]
    if not documents:
        return [*found, "is empty"]
    for document in documents:
        if not isinstance(document, dict):
            found.append("is neither a cluster file nor a manifest")
            continue
        if not found:  # the same secret would be named twice
            found += text.secret_fields(document)
        if "apiVersion" in document:
            found += manifest_problems(document, list(definitions))
        elif is_runtime_env(document):
            found += runtime_problems(document)
        else:
            found += launch_problems(document)
    return found


def main(arguments: Sequence[str]) -> int:
    """Prints a line for each file and each problem; 1 where there is one, 2 for wrong usage."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    files: list[Path] = []
    definitions: list[dict[str, Any]] = []
    given = iter(arguments)
    for word in given:
        if word == "--crd":
            path = next(given, None)
            if path is None or not Path(path).is_file():
                print("--crd takes a file of CustomResourceDefinitions", file=sys.stderr)
                return 2
            definitions += [d for d in yaml.safe_load_all(Path(path).read_text()) if d]
        elif word.startswith("-"):
            print(f"unknown option {word}; there are --crd FILE and --help", file=sys.stderr)
            return 2
        else:
            files.append(Path(word))
    files = files or sorted(path for pattern in CHECKED for path in FOLDER.glob(pattern))
    wrong = 0
    for path in files:
        found = problems(path, definitions)
        wrong += bool(found)
        count = text.unfilled(path.read_text()) if path.is_file() else 0
        note = f" ({count} lines to fill in: grep REPLACE)" if count else ""
        print(f"{path}: {'wrong' if found else 'ok'}{note}")
        for said in found:
            print(f"    {said}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
