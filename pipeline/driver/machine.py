"""The machine of a job in words: processors and accelerators."""

from __future__ import annotations

from collections.abc import Mapping

TYPE = "accelerator_type:"  # how Ray calls a kind of GPU among its resources


def machine() -> str:
    """Of the cluster that is joined: `8 × H100, 96 CPU cores, 2 nodes`."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return words_of(ray.cluster_resources(), len(alive))


def words_of(resources: Mapping[str, float], nodes: int = 1) -> str:
    """What a cluster has, in words.

    Args:
        resources: as Ray counts them.
        nodes: that are alive.
    """
    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    kinds = [name.removeprefix(TYPE) for name in resources if name.startswith(TYPE)]
    parts = [f"{gpus} × {', '.join(kinds) or 'GPU'}"] if gpus else []
    parts.append(f"{cores:,} CPU core" + "s" * (cores != 1))
    if nodes > 1:
        parts.append(f"{nodes:,} nodes")
    return ", ".join(parts)
