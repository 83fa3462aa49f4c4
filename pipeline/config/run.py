"""Which run this is, where it is tracked, what it takes from the cluster, what leaves it."""

from __future__ import annotations

import warnings
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Positive, Section

# Classes of pydantic are abstract ones, which have a `register` of their own; nobody calls it.
warnings.filterwarnings("ignore", message='Field name "register" in "Track" shadows')


class Run(Section):
    """Which run this is."""

    name: str = Field("", description="name of the run; default: the recipe's file name")
    folder: str = Field(
        "runs", description="where run folders go: a path that all nodes share, or a URI"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of everything that is drawn")


class Track(Section):
    """MLflow."""

    enabled: bool = Field(True, description="false: the local journal only, no MLflow")
    uri: str = Field(
        "",
        description="MLflow server, or sqlite:///FILE; default: MLFLOW_TRACKING_URI, else one is "
        "started",
    )
    experiment: str = Field("", description="MLflow experiment; default: the run's name")
    system_metrics: bool = Field(True, description="CPU, memory and GPU use of rank 0's machine")
    register: str = Field(
        "", description="registered model that the weights become a version of; empty: only logged"
    )
    model_name: str = Field("", description="the earlier name of track.register")

    @model_validator(mode="after")
    def _one_name(self) -> Track:
        if self.register and self.model_name and self.register != self.model_name:
            raise ValueError(
                f"track.register={self.register} and track.model_name={self.model_name} are two "
                "names of one thing; set track.register"
            )
        return self

    @field_validator("uri")
    @classmethod
    def _address(cls, value: str) -> str:
        if "@" in value and "://" not in value:
            raise ValueError("is no address, and has an @ in it; write http://HOST:5000")
        return value


class Resources(Section):
    """What the run takes from the machine or cluster."""

    cpus: Positive | None = Field(None, description="CPUs for a Ray started here; default: all")
    object_store_gb: float = Field(2.0, gt=0, description="object store of a Ray started here")
    cpus_per_worker: float | None = Field(
        None,
        gt=0,
        description="CPUs that a training worker reserves; default: a quarter, 1 with GPU",
    )
    gpus_per_worker: float = Field(
        1.0, gt=0, le=1, description="below 1, training workers share a GPU, over gloo"
    )
    decode_tasks: Positive | None = Field(
        None, description="decode tasks at once; default: what the free CPUs allow"
    )
    streams: Positive | Literal["auto"] = Field(
        "auto",
        description="Ray Data executions that feed the workers; auto: one for each node of workers",
    )
    feeder_cpus: float | None = Field(
        None,
        ge=0,
        description="CPUs of the driver's node that decoders leave to the feeder; default: 1 on "
        "a node with 16 and more, if workers leave it",
    )
    wait_s: float = Field(
        0.0,
        ge=0,
        description="how long a plan waits for nodes that may still come; 0: refused at once",
    )
    replace_s: float = Field(
        900.0,
        ge=0,
        description="how long training waits for room again, e.g. for another node for a lost one",
    )
    threads: Positive | None = Field(
        None, description="torch threads of a worker; default: the machine's CPUs over its workers"
    )


class Export(Section):
    """Which weights leave the run."""

    checkpoint: Literal["best", "last"] = Field(
        "best", description="which teacher is exported: the best by evaluate.decide_by, or the last"
    )
    onnx: bool = Field(
        False, description="write weights/onnx too: fp32, fp16 and int8 (needs the extra onnx)"
    )
    onnx_sizes: tuple[Positive, ...] = Field(
        (), description="image sizes of files in ONNX beside that of the verdict, pixels"
    )
