"""Serving a model and its vectors over HTTP, until Ctrl-C or SIGTERM; no stage of the chain."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import time
from contextlib import suppress

from pipeline.config.config import Config
from pipeline.config.use import Serve
from pipeline.driver import cluster
from pipeline.embed.embedders import absolute_model
from pipeline.errors import PipelineError, PlacementError, last_line
from pipeline.heartbeat import doing, idle
from pipeline.serve.deployment import APPLICATION, Replicas, application
from pipeline.serve.opening import Served, checked
from pipeline.serve.token import is_loopback, own_token
from pipeline.storage.places import absolute_uri
from pipeline.storage.run_folder import RunFolder

log = logging.getLogger("pipeline.serve")
LOOK_S = 2.0  # between two looks at whether Ray still answers
START_S = 30.0  # for the HTTP proxy to listen


def serve(config: Config, dry: bool = False) -> None:
    """Serves until the process is told to end.

    Args:
        config: its section `serve`; where that names nothing, the vectors of the recipe's run.
        dry: only check and say what would be served.

    Raises:
        PipelineError: the port is taken, there is no room, or what is to be served is not there.
        SystemExit: with 143 after a SIGTERM. After Ctrl-C it returns.
    """
    settings = config.serve
    token = own_token() if settings.needs_token else ""
    model = absolute_model(settings.model, config.run.folder) if settings.model else ""
    vectors = absolute_uri(place) if (place := _vectors(config)) else ""
    served = checked(model, vectors, settings.decisions)
    settings = settings.model_copy(update={"port": free_port(settings.host, settings.port)})
    if not token and not is_loopback(settings.host):
        log.warning("token       none is asked for: whoever reaches %s sees all", settings.host)
    if dry:
        log.info("serve       %s at %s", _contents(served), _address(settings))
        return
    with cluster.joined(config.resources):
        try:
            _serve(settings, served, token)
        except KeyboardInterrupt:
            log.info("ended       by Ctrl-C")
        finally:
            if not _starts_ray():  # else Ray itself ends, and all that is served with it
                with doing("ending what was served"):
                    _shut_down()


def _serve(settings: Serve, served: Served, token: str) -> None:
    from ray.exceptions import RayError

    try:
        from ray import serve as ray_serve
    except ImportError as error:
        raise PipelineError(
            f"Ray Serve lacks a package: {error.name or error}",
            "make installs it; elsewhere: pip install -c constraints.txt 'ray[serve]'",
        ) from error

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it is set to INFO when imported
    replicas = replicas_for(settings) if served.spec else Replicas(0, 0, 0, _starts_ray())
    _refuse_second()
    with doing("starting the replicas"):
        try:
            ray_serve.start(
                proxy_location="HeadOnly",
                http_options={
                    "host": settings.host,
                    "port": settings.port,
                    "request_timeout_s": settings.timeout_s * 2,  # reading and answering
                },
            )
            ray_serve.run(
                application(settings, served, token, replicas), name=APPLICATION, route_prefix="/"
            )
        except (RayError, RuntimeError) as error:
            raise PipelineError(
                f"what is served did not start: {_reason() or last_line(error)}",
                "PIPELINE_DEBUG=1 shows the whole reason",
            ) from error
    log.info("serving     %s until Ctrl-C", _contents(served))
    # Past the log, which leaves secrets out of addresses, and on this console alone.
    sys.stdout.write(f"page        {_address(settings)}{f'#token={token}' if token else ''}\n")
    sys.stdout.flush()
    with idle():
        while True:
            time.sleep(LOOK_S)
            try:
                ray_serve.status()
            except RayError as error:
                raise PipelineError(
                    f"Ray does not answer any more: {last_line(error)}", "start the job again"
                ) from error


def _vectors(config: Config) -> str:
    """The folder that is named, else that of the recipe's run where no model is named either."""
    if config.serve.vectors or config.serve.model:
        return config.serve.vectors
    run = RunFolder.of(config.run.folder, config.run.name) if config.run.name else None
    return config.embed.vectors or (str(run.uri or run.path) if run else "")


def _contents(served: Served) -> str:
    vectors = [f"{served.vectors.rows:,} vectors"] if served.vectors else []
    return " and ".join(([served.spec.name] if served.spec else []) + vectors)


def _address(settings: Serve) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}/"


def free_port(host: str, port: int) -> int:
    """The port itself, or a free one for 0.

    Raises:
        PipelineError: it is taken, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PipelineError(
                    f"port {port} of {host} is taken by another program",
                    "end it, or give another: serve.port=0 takes any that is free",
                ) from None
            raise PipelineError(
                f"serve.host={host} port {port} cannot be listened at: {error.strerror or error}",
                "127.0.0.1 is this machine alone, 0.0.0.0 all its addresses",
            ) from None
        return int(listening.getsockname()[1])


def replicas_for(settings: Serve) -> Replicas:
    """What each replica gets on this cluster.

    Raises:
        PlacementError: there is no room for them.
    """
    import ray

    has = ray.cluster_resources()
    cpus, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
    each = settings.gpus
    if each is None:
        each = 1.0 if gpus >= settings.replicas else 0.0
    needs = f"{settings.replicas} replicas with {settings.cpus} CPUs and {each:g} GPUs each"
    if settings.replicas * settings.cpus > cpus or settings.replicas * each > gpus:
        raise PlacementError(
            f"{needs}, but the cluster has {cpus:g} CPUs and {gpus:g} GPUs",
            "set serve.replicas, serve.cpus and serve.gpus to what there is",
        )
    return Replicas(settings.replicas, settings.cpus, each, _starts_ray())


def _refuse_second() -> None:
    """A cluster has one Serve, whose address was fixed when it was started."""
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise PipelineError(
        "something is served on this cluster already",
        "end it with `serve shutdown`, or start without RAY_ADDRESS",
    )


def _reason() -> str:
    """What a deployment says of itself, where one did not start."""
    from ray import serve as ray_serve

    application = ray_serve.status().applications[APPLICATION]
    said = [one.message for one in application.deployments.values() if one.message]
    log.debug("deployments %s", "\n".join(said))
    return last_line("\n".join(said)) if said else ""


def _shut_down() -> None:
    from ray import serve as ray_serve
    from ray.exceptions import RayError

    with suppress(RayError, RuntimeError):  # Ray itself may be gone
        ray_serve.shutdown()


def _starts_ray() -> bool:
    return not os.environ.get("RAY_ADDRESS")
