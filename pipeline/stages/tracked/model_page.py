"""The page of an exported model in MLflow: what it is, how to load it, what it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.images.preprocessing import Preprocessing
from pipeline.plan.plan import Plan
from pipeline.stages.tracked.pipeline_page import name_of_images
from pipeline.uri import public

CODE_LICENCE = "Apache-2.0"
LOAD = """```python
import mlflow, pandas
from pathlib import Path

mlflow.set_tracking_uri("http://…")  # this server
model = mlflow.pyfunc.load_model("MODEL_URI")
images = pandas.DataFrame({"image": [Path("photo.jpg").read_bytes()]})
vectors = model.predict(images)["embedding"]  # a list of numbers for each image
```"""


def page(
    plan: Plan,
    step: int,
    images: Preprocessing,
    width: int,
    verdict: str,
    formats: Mapping[str, str],
) -> str:
    """The description of the model, markdown.

    Args:
        plan: that it was trained with.
        step: of its checkpoint; 0: the weights that training began with.
        images: that it takes.
        width: numbers of an embedding.
        verdict: of the run's evaluation; may be empty.
        formats: weights that were written beside it, by format.
    """
    config = plan.config
    size = images.image_size
    parts = [
        verdict or "An image encoder; there is no verdict on it yet.",
        f"**Takes** encoded image files (column `image`), which it cuts to {size} x {size} pixels "
        f"as the evaluation does. **Gives** {width:,} numbers for each (column `embedding`).",
        f"**Load it**\n\n{LOAD}",
        f"**Trained on** {name_of_images(config)}: {plan.images:,} images, digest "
        f"`{plan.digest[:16]}`, {_steps(plan, step)}.",
        f"**As files** in the run's folder `weights/`: {', '.join(formats)}.",
        f"**Licence** of the code inside: {CODE_LICENCE}. {_weights_licence(plan)}",
    ]
    return "\n\n".join(parts)


def _steps(plan: Plan, step: int) -> str:
    if step == 0:
        return "but no step is in it: it is what training began with, which was kept"
    of = "" if step == plan.steps else f" of {plan.steps:,} planned"
    return f"{step:,} steps{of}, each of {plan.config.optim.global_batch_size:,} images"


def tags(plan: Plan, run: str, rule: str) -> dict[str, str]:
    """To find a model by.

    Args:
        plan: that it was trained with.
        run: name of the run.
        rule: of the verdict; may be empty.
    """
    config = plan.config
    began = {"began_as": public(config.model.init)} if config.model.init else {}
    return {
        "recipe": run,
        "verdict.rule": rule or "none",
        "images": name_of_images(config),
        "images.manifest": plan.digest,
        "curated": config.curate.preset or "no",
        "licence.code": CODE_LICENCE,
        **began,
    }


def _weights_licence(plan: Plan) -> str:
    if init := plan.config.model.init:
        return (
            f"The weights began as {public(init)}: what its licence asks holds for them too, as "
            "does what the images allow."
        )
    return "The weights are as free as the images that they were trained on."


def facts(evaluated: Mapping[str, Any]) -> tuple[str, str]:
    """Verdict and rule of a finished evaluation."""
    return str(evaluated.get("verdict", "")), str(evaluated.get("rule", ""))
