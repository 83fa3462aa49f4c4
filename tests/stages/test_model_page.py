"""The description of a model says what was done, not what was planned."""

from __future__ import annotations

import pytest

from pipeline.config.load import load
from pipeline.images.preprocessing import Preprocessing
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve
from pipeline.stages.tracked.model_page import page


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (120, ", 120 steps, each of 16 images."),
        (61, ", 61 steps of 120 planned, each of 16 images."),
        (0, ", but no step is in it"),
    ],
)
def test_steps_are_those_of_the_checkpoint(step: int, words: str) -> None:
    fields = ["optim.steps=120", "optim.global_batch_size=16", "model.init=w.pth"]
    config = load(["data.source=photos/", *fields])
    plan = resolve(config, SetFacts(600, "d"), Machine(cpus=2, gpus=0, bfloat16=False))
    text = page(plan, step, Preprocessing(image_size=28), 64, "", {"timm": ""})
    assert f"600 images, digest `d`{words}" in text
