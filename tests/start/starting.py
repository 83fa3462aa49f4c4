"""Folders, machines and recipes for the tests of jobs/start.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import job
from pipeline.commands.table import COMMANDS
from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.plan.layout import Machine
from pipeline.plan.nodes import Node
from pipeline.start.folder import Folder
from pipeline.start.machine import GB, Surroundings


def picture(path: Path, side: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def ran(*words: str) -> None:
    command = COMMANDS["start"]
    job.main(["start"], "doc", [*words, "track.enabled=false"], command.shorthand, command.words)


def here(cpus: int = 2, gb: float = 0.0) -> Surroundings:
    """A machine, as `machine.look` would give it; its speed is not tried."""
    gpus = int(gb > 0)
    nodes = (Node(cpus, gpus, driver=True),)
    machine = Machine(cpus=cpus, gpus=gpus, bfloat16=True, nodes=nodes)
    return Surroundings(machine, "a machine", "", gb * GB, "", 8e9, None, False)


def pile(number: int, side: int = 400) -> Folder:
    return Folder("photos/", "", number, number * 10**5, sides=(side,), megapixels=(0.2,))


def config(*fields: str) -> Config:
    return load(["data.source=photos/", *fields])
