"""The trained backbone as an MLflow model: encoded images in, embeddings out.

MLflow runs this very file to load the model ("models from code"), so nothing is pickled: the
weights are the exported safetensors, and the code beside them is this package.

    model = mlflow.pyfunc.load_model("models:/dinov2-vits14@best")
    model.predict(pandas.DataFrame({"image": [Path("cat.jpg").read_bytes()]}))["embedding"]
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as DINOv2 was trained
PACKAGES = (
    *("mlflow", "torch", "torchvision", "numpy", "pandas", "pillow", "safetensors"),
    "simplejpeg",  # of images/jpeg.py
)
BATCH = 32
DIGEST_LIMIT = 36  # characters; MLflow refuses more
ORIGIN = (  # tags of a run from which the model's page has `Created by` and `Logged from`
    *("mlflow.user", "mlflow.source.name", "mlflow.source.type", "mlflow.source.git.commit"),
)
ABOUT = (
    "Image encoders, a version for each export. Alias `best` is the one with the highest k-NN: "
    '`mlflow.pyfunc.load_model("models:/{name}@best")`.'
)


def send_model(client: Any, run_id: str, weights: Path, spec: dict[str, Any]) -> str:
    """Logs the model to a run and returns its id; registers it if `spec` has a name.

    Args:
        client: MlflowClient.
        run_id: the run that made it.
        weights: folder with safetensors and config.json.
        spec: the fields of `tracker.ModelCard`.
    """
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc.utils import data_validation
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    # Advice in colour that passes all filters; the signature below says what type hints would.
    data_validation.color_warning = lambda *_, **__: None
    columns_in = Schema([ColSpec(DataType.binary, "image")])
    columns_out = Schema([ColSpec(Array(DataType.double), "embedding")])
    config = {
        "image_size": int(spec.get("image_size") or 0),
        "mean": list(spec.get("mean") or MEAN),
        "std": list(spec.get("std") or STD),
        "value_range": spec.get("value_range", "full"),
    }
    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    origin = {name: run.data.tags[name] for name in ORIGIN if name in run.data.tags}
    logged = client.create_logged_model(
        experiment,
        name="embedder",
        source_run_id=run_id,
        params={name: str(value) for name, value in spec.get("params", {}).items()},
        tags=origin | {name: str(value) for name, value in spec.get("tags", {}).items()},
        model_type="image encoder",
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on type hints and examples, in colour
        path = f"{folder}/model"
        mlflow.pyfunc.save_model(
            path,
            mlflow_model=Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_uuid=logged.model_id,
                model_id=logged.model_id,
            ),
            python_model=__file__,
            artifacts={"weights": str(weights.absolute())},
            code_paths=[str(Path(__file__).parents[1])],
            signature=ModelSignature(inputs=columns_in, outputs=columns_out),
            input_example=_example(config["image_size"] or 64, len(config["mean"])),
            pip_requirements=_pins(weights),
            model_config=config,
        )
        client.log_model_artifacts(logged.model_id, path)
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    images, digest = spec.get("data") or ("", "")
    of_images = {"dataset_name": images, "dataset_digest": digest[:DIGEST_LIMIT]} if images else {}
    for name, value in spec.get("metrics", {}).items():
        client.log_metric(run_id, name, value, model_id=logged.model_id, **of_images)
    address = f"models:/{logged.model_id}"
    if spec.get("name"):
        address = f"models:/{spec['name']}/{_register(client, run_id, logged.model_id, spec)}"
    if page := spec.get("page"):
        text = {"mlflow.note.content": page.replace("MODEL_URI", address)}
        client.set_logged_model_tags(logged.model_id, text)
    return str(logged.model_id)


def _example(side: int, channels: int) -> Any:
    """One image as the model takes it: a file's bytes, of a grey ramp."""
    import numpy as np
    import pandas as pd  # type: ignore[import-untyped]
    from PIL import Image

    ramp = np.linspace(0, 255, side * side).astype(np.uint8).reshape(side, side)
    file = io.BytesIO()
    if channels in (1, 3):
        Image.fromarray(ramp).save(file, "PNG")
    else:
        np.save(file, np.repeat(ramp[..., None], channels, 2))
    return pd.DataFrame({"image": [file.getvalue()]})


def _register(client: Any, run_id: str, model_id: str, spec: dict[str, Any]) -> str:
    """Makes a version of the registered model, and gives its number."""
    from mlflow.exceptions import MlflowException

    name, score = spec["name"], spec.get("score")
    try:
        client.create_registered_model(name, description=ABOUT.format(name=name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {name: str(value) for name, value in spec.get("tags", {}).items()}
    tags.pop("images.manifest", None)  # the model's page has it; the table of versions is narrow
    version = client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=run_id,
        description=spec.get("note", ""),
        tags=tags | ({} if score is None else {"score": str(score)}),
        model_id=model_id,
    ).version
    try:
        best = client.get_model_version_by_alias(name, "best")
    except MlflowException:
        best = None
    if best is None or (score is not None and score > float(best.tags.get("score", "-inf"))):
        client.set_registered_model_alias(name, "best", version)
    return str(version)


def _pins(weights: Path) -> list[str]:
    """The installed versions, without a local suffix such as +cu128 that no index has."""
    foreign = "architecture" in json.loads((weights / "config.json").read_text())  # timm's
    names = (*PACKAGES, "timm") if foreign else PACKAGES
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]


def _set_model() -> None:
    """Called when MLflow runs this file."""
    import pandas as pd
    from mlflow.models import set_model
    from mlflow.pyfunc import PythonModel

    class Embedder(PythonModel):  # type: ignore[misc]
        def load_context(self, context: Any) -> None:
            from pipeline.errors import PipelineError
            from pipeline.images.value_range import FULL, from_json
            from pipeline.model.foreign_weights import load_any

            self.backbone, spec = load_any(Path(context.artifacts["weights"]))
            config = context.model_config
            self.size = config["image_size"] or spec.image_size
            self.mean, self.std = config["mean"], config["std"]
            self.channels = spec.in_channels
            self.value_range = from_json(config.get("value_range", FULL)) or FULL
            if not len(self.mean) == len(self.std) == self.channels:
                raise PipelineError(
                    f"the model has {self.channels} channels, its normalisation "
                    f"{len(self.mean)} means and {len(self.std)} deviations",
                    hint="log the model with the mean and std that it was trained with",
                )

        def predict(
            self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
        ) -> pd.DataFrame:
            images = list(model_input["image"])
            rows = []
            for first in range(0, len(images), BATCH):
                crops = [
                    self.crop(image, number)
                    for number, image in enumerate(images[first : first + BATCH], first)
                ]
                rows += self.embed(crops)
            return pd.DataFrame({"embedding": rows})

        def crop(self, image: bytes, number: int) -> Any:
            from mlflow.exceptions import MlflowException

            from pipeline.images.decode import BadImage, decode_image
            from pipeline.views.crops import resize_centre_crop

            try:
                pixels = decode_image(bytes(image), self.channels, value_range=self.value_range)
            except (BadImage, TypeError) as error:
                why = ": ".join(map(str, error.args)) or "nothing"
                raise MlflowException.invalid_parameter_value(
                    f"image {number} cannot be used ({why}); send the bytes of an image file, in "
                    "JSON as base64"
                ) from None
            return resize_centre_crop(pixels, self.size)

        def embed(self, crops: list[Any]) -> list[list[float]]:
            import numpy as np
            import torch

            pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255.0
            mean, std = torch.tensor(self.mean), torch.tensor(self.std)
            with torch.inference_mode():
                features = self.backbone((pixels - mean[:, None, None]) / std[:, None, None])
            rows: list[list[float]] = features.double().tolist()
            return rows

    set_model(Embedder())


if __name__ != "pipeline.track.embedder":  # run by MLflow under a name of its own
    _set_model()
