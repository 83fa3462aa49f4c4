"""Where the evaluator of a run is put: on no node without CPUs, if there is another."""

from __future__ import annotations

from typing import Any

from pipeline.train.evaluations import roomiest


def node(name: str, cpus: float | None, alive: bool = True) -> dict[str, Any]:
    resources = {"memory": 1e9} | ({} if cpus is None else {"CPU": cpus})
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def test_the_living_node_with_the_most_cpus() -> None:
    head = node("head", None)
    assert roomiest([head, node("a", 2), node("b", 8), node("gone", 64, alive=False)]) == "b"
    assert roomiest([head, node("bare", 0)]) == ""  # Ray may choose
    assert roomiest([]) == ""
