"""What we use of Ray Serve's private parts: where the replicas of an endpoint listen."""

from __future__ import annotations

from typing import Any

from pipeline.driver.ray_internals import private


def serve_on_loopback() -> None:
    """Called in a replica's constructor, after which Ray Serve opens a port for calls from other
    replicas: on all addresses of the machine, and it reads pickles from whoever connects. On a
    cluster that must be so, and its network is private (SECURITY.md). A laptop keeps it to itself.
    """
    with private("so that the endpoint of a laptop is for this machine alone"):
        from ray.serve._private import replica

        opening = replica.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> Any:
        return opening(server, address.replace("[::]:", "127.0.0.1:"))

    replica.add_port_to_grpc_server = on_loopback
