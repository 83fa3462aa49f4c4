"""The endpoint and the page of a set of vectors."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.section import NonNegative, Positive, Section


class Serve(Section):
    """A model and its vectors over HTTP, on this machine alone unless a host is named."""

    model: str = Field(
        "",
        description="what embeds images that are sent, as embed.model; default: the vectors' own",
    )
    vectors: str = Field("", description="vectors to search and to show, written by jobs/embed.py")
    decisions: str = Field(
        "", description="run whose curation's decisions are shown; default: the vectors' own run"
    )
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: all of the machine")
    port: int = Field(8000, ge=0, le=65535, description="0: any that is free")
    needs_token: bool = Field(
        True,
        description="false: none is asked for; it is RAYDINO_TOKEN in the environment or a new one",
    )
    readers: Positive = Field(
        1, description="processes that read, decode and search, each with the vectors in memory"
    )
    replicas: Positive = Field(1, description="copies of the model, each with cpus and gpus")
    cpus: Positive = Field(1, description="CPUs of a replica, and threads of its model")
    gpus: float | None = Field(
        None, ge=0, description="of each replica; default: 1 where the cluster has them"
    )
    batch_size: Positive = Field(32, description="images that the model takes at once")
    batch_wait_ms: NonNegative = Field(
        5.0, description="how long the first image of a batch waits for others"
    )
    queue: Positive = Field(
        128, description="requests for the model in a reader, waiting or running; more get 503"
    )
    timeout_s: float = Field(
        30.0, gt=0, description="how long a request may take; a body that comes slower gets 408"
    )
    max_mb: float = Field(20.0, gt=0, description="megabytes of a request; more gets 413")
    max_pixels: Positive = Field(50_000_000, description="height x width; more gets 413")
    max_k: Positive = Field(1000, description="most neighbours of one search")
