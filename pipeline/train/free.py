"""What a run that moves may have of a cluster that others use as well.

That is what is free now, what its training workers hold, and what the actors that end with the
group hold: decoders and readers. What other jobs hold, and this run's evaluator, stays where it is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import ray
from ray._private.state import state
from ray.core.generated import gcs_pb2

from pipeline.cluster import Seen
from pipeline.placement import Node, Share


def free_nodes(nodes: Mapping[str, Seen], workers: Iterable[str], share: Share) -> list[Node]:
    """The nodes that stay, each with what this run may have of it.

    Args:
        nodes: those that are alive, by id.
        workers: for each training worker the id of its node.
        share: what each of them reserves.
    """
    free, working = state.available_resources_per_node(), Counter(workers)
    helping = _helpers_cpus()
    found = []
    for key, (node, leaving) in nodes.items():
        if not leaving:
            has, mine = free.get(key, {}), share.times(working[key])
            cpus = has.get("CPU", 0.0) + mine.cpus + helping.get(key, 0.0)
            gpus = has.get("GPU", 0.0) + mine.gpus
            found.append(node._replace(cpus=min(node.cpus, cpus), gpus=min(node.gpus, gpus)))
    return found


def _helpers_cpus() -> dict[str, float]:
    """CPUs that actors of this job hold, by node; those of training workers belong to their group
    of bundles, and the evaluator has none.
    """
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    found: dict[str, float] = defaultdict(float)
    # `actor_table` has this already, without the resources
    for row in state._connect_and_get_accessor().get_actor_table(job, "ALIVE"):
        actor = gcs_pb2.ActorTableData.FromString(row)
        if not actor.placement_group_id:
            found[actor.address.node_id.hex()] += actor.required_resources.get("CPU", 0.0)
    return found
