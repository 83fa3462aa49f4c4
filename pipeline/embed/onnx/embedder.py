"""A model in ONNX as an embedder, ours or a user's: its signature and metadata say what it takes.

Metadata that is read: `mean`, `std`, `value_range` (JSON lists) and `patch_size`, as
`pipeline.model.onnx_out` writes them. The channels are as many as `mean` has numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError, one_line, shortened

DEFAULT_SIZE = 224  # pixels, where the model leaves its input's size open
EXPECTED = (
    "expected one input [batch, 3, height, width] or [batch, height, width, 3] of uint8, float16 "
    "or float (3: as many as mean has numbers), and an output [batch, width] (or tokens [batch, "
    "tokens, width], CLS first)"
)
Array = np.ndarray[Any, Any]
_KINDS = {
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


@dataclass(frozen=True)
class Signature:
    """What a model takes.

    Attributes:
        name: of the input.
        kind: uint8 takes pixels as they are; floats take (pixels / 255 - mean) / std.
        channels_last: [b, S, S, C] instead of [b, C, S, S].
        size: S, pixels.
        batch: images at once where the model fixes them, else 0.
        mean: of each channel.
        std: of each channel.
    """

    name: str
    kind: Any
    channels_last: bool
    size: int
    batch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class OnnxModel:
    """An ONNX model: uint8 [b, S, S, C] to float32 [b, D].

    Attributes:
        signature: what it takes.
        dim: D.
        patch_size: in pixels, where it has an output `patches` [b, P, D]; else None.

    Args:
        path: of the `.onnx` file, beside which the files of its weights lie.
        image_size: S where the model leaves it open; default 224.
        mean: where the model's metadata has no `mean` (a JSON list).
        std: likewise.
        threads: of one call.
        gpu: use CUDA where onnxruntime has it.
        name: for messages; default: the path.

    Raises:
        DataError: onnxruntime is missing, or the model does not fit; says what was found.
    """

    def __init__(
        self,
        path: str,
        image_size: int | None,
        mean: Sequence[float],
        std: Sequence[float],
        threads: int = 1,
        gpu: bool = False,
        name: str = "",
    ) -> None:
        name = name or path
        try:
            import onnxruntime
        except ImportError as error:
            raise DataError(
                f"{name} needs the package onnxruntime, which is not installed",
                "from the clone: python -m pip install -c constraints.txt -e '.[onnx]'",
            ) from error
        if not Path(path).is_file():
            raise DataError(f"no model: there is no {name}", "give the path of a .onnx file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        known = onnxruntime.get_available_providers()
        providers = ["CUDAExecutionProvider"] * gpu + ["CPUExecutionProvider"]
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=[one for one in providers if one in known]
            )
        except Exception as error:  # its classes of errors are of each version's own
            reason = shortened(one_line(error).splitlines()[0])
            raise DataError(f"{name} cannot be opened: {reason}", EXPECTED) from error
        self.name = name
        self.signature = _signature(self._session, name, image_size, mean, std)
        side, channels = self.signature.size, len(self.signature.mean)
        self._names = [out.name for out in self._session.get_outputs()]
        patch = self._session.get_modelmeta().custom_metadata_map.get("patch_size", "")
        self.patch_size = int(patch) if patch.isdigit() and "patches" in self._names else None
        self.dim = self.outputs(np.zeros((1, side, side, channels), np.uint8))["cls"].shape[1]

    @property
    def device(self) -> str:
        """Where onnxruntime computes: `cuda` or `cpu`."""
        return "cuda" if "CUDA" in self._session.get_providers()[0] else "cpu"

    def of_values(self, values: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, Array]:
        """The same as `outputs`, of values 0 to 1, float32 [b, S, S, C]."""
        if self.signature.kind == np.uint8:
            return self.outputs(np.rint(values.clip(0, 1) * 255).astype(np.uint8))
        return self.outputs(values)

    def outputs(self, images: Array) -> dict[str, Array]:
        """uint8 [b, S, S, C] to `cls` float32 [b, D], and `patches` [b, P, D] where it has them."""
        fixed = self.signature.batch
        if not fixed:
            return self._run(images)
        outputs = []
        for at in range(0, len(images), fixed):
            part = images[at : at + fixed]
            filled = np.concatenate([part, np.repeat(part[-1:], fixed - len(part), 0)])
            outputs.append({name: x[: len(part)] for name, x in self._run(filled).items()})
        return {name: np.concatenate([each[name] for each in outputs]) for name in outputs[0]}

    def _run(self, images: Array) -> dict[str, Array]:
        signature = self.signature
        x = images
        if signature.kind != np.uint8:
            centre, scale = (np.asarray(v, np.float32) for v in (signature.mean, signature.std))
            values = x.astype(np.float32) / 255 if x.dtype == np.uint8 else x
            x = ((values - centre) / scale).astype(signature.kind)
        if not signature.channels_last:
            x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        try:
            outputs = self._session.run(None, {signature.name: x})
        except Exception as error:
            reason = shortened(one_line(error).splitlines()[0])
            raise DataError(
                f"{self.name} failed on images {x.shape}: {reason}", EXPECTED
            ) from error
        named = {"cls": self._features(outputs, len(images))}
        if self.patch_size:
            named["patches"] = outputs[self._names.index("patches")]
        return named

    def _features(self, outputs: Sequence[Any], images: int) -> Array:
        """The output that is one vector an image: features, then features of 1 x 1 pixels, then
        the first of the tokens.
        """
        for rank in (2, 4, 3):
            for out in outputs:
                shape = np.shape(out)
                if len(shape) != rank or shape[0] != images:
                    continue
                if rank == 2:
                    return np.asarray(out, np.float32)
                if rank == 4 and shape[2:] == (1, 1):
                    return np.asarray(out[:, :, 0, 0], np.float32)
                if rank == 3:
                    return np.asarray(out[:, 0], np.float32)
        shapes = ", ".join(str(np.shape(out)) for out in outputs)
        raise DataError(f"{self.name} gives {shapes} for {images} images", EXPECTED)


def _signature(
    session: Any,
    path: str,
    image_size: int | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> Signature:
    inputs = session.get_inputs()
    shown = ", ".join(f"{x.name} {x.type} {x.shape}" for x in inputs)
    wrong = DataError(f"{path} takes {shown or 'nothing'}", EXPECTED)
    if len(inputs) != 1 or inputs[0].type not in _KINDS or len(inputs[0].shape) != 4:
        raise wrong
    metadata = session.get_modelmeta().custom_metadata_map
    values = {
        name: numbers_in(metadata, name, path) or tuple(float(v) for v in default)
        for name, default in (("mean", mean), ("std", std))
    }
    shape, channels = inputs[0].shape, len(values["mean"])
    if (shape[1] == channels) == (shape[3] == channels):
        raise wrong
    last = shape[3] == channels
    sides = {side for side in (shape[1:3] if last else shape[2:]) if isinstance(side, int)}
    if len(sides) > 1:
        raise wrong
    fixed = next(iter(sides), None)
    if fixed and image_size and fixed != image_size:
        raise DataError(
            f"{path} takes images of {fixed} x {fixed} pixels, image_size={image_size}",
            "leave image_size empty",
        )
    return Signature(
        name=inputs[0].name,
        kind=_KINDS[inputs[0].type],
        channels_last=last,
        size=fixed or image_size or DEFAULT_SIZE,
        batch=shape[0] if isinstance(shape[0], int) else 0,
        **values,
    )


def numbers_in(metadata: Mapping[str, str], name: str, path: str) -> tuple[float, ...]:
    """An entry of the metadata that is a JSON list of numbers; empty where there is none.

    Raises:
        DataError: it is something else.
    """
    try:
        return tuple(float(v) for v in json.loads(metadata.get(name, "[]")) or ())
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path} has metadata {name}={metadata[name]!r}, expected a JSON list of numbers",
            "export the model again, or take the entry out",
        ) from error
