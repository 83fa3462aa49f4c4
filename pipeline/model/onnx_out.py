"""A backbone as ONNX: one file for each image size and each kind of numbers.

Position embeddings are resized for a size by torch itself, antialiased where the network does so,
and become constants of the file: that is exact, while a file for any size would need ONNX's own
resizing, whose bicubic filter is another one. The number of images stays open.

Files take `image` float32 `[batch, C, S, S]`, normalised, and give `cls` float32 `[batch, D]` and,
where there are patches, `patches` float32 `[batch, P, D]`, after the last norm. `fp16` computes in
half precision; `int8` has its matrices in 8 bits (dynamic quantisation of ONNX Runtime).
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError, one_line
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.foreign import ForeignBackbone, TimmBackbone
from pipeline.model.formats import deep_key
from pipeline.model.vit import VisionTransformer
from pipeline.model.weights import tensors_digest

OPSET = 18  # read by ONNX Runtime from 1.14 on
KINDS = ("fp32", "fp16", "int8")
TOLERANCE = 1e-4  # of the largest output, for fp32
INLINE = 2**30  # bytes of weights in the file itself; more lie beside it (protobuf ends at 2 GiB)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class OnnxFile:
    """A file that was written.

    Attributes:
        path: of the `.onnx` file.
        kind: fp32, fp16 or int8.
        size: S, pixels.
        error: largest difference to torch in any output, over the largest output.
        bytes: of the file, and of the weights beside it.
    """

    path: Path
    kind: str
    size: int
    error: float
    bytes: int

    def __str__(self) -> str:
        return f"{self.path.name} ({self.bytes / 2**20:.1f} MiB, error {self.error:.1g})"


def save_onnx(
    backbone: VisionTransformer | ForeignBackbone,
    folder: Path,
    sizes: Sequence[int],
    images: Preprocessing,
    kinds: Sequence[str] = KINDS,
) -> list[OnnxFile]:
    """Writes `folder/<kind>-<size>.onnx` for all sizes and kinds, each loaded back and compared.
    The folder appears whole, and what was in it is gone.

    Args:
        backbone: on the CPU.
        folder: made here.
        sizes: of images in pixels, multiples of the patch size.
        images: that it takes, for the metadata, beside `image_size`, `digest` and `patch_size`.
        kinds: of KINDS.

    Raises:
        PipelineError: a package is missing, a size does not fit, or fp32 differs from torch.
    """
    needs_packages()
    fresh = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}")
    fresh.mkdir(parents=True)
    digest = tensors_digest(backbone)
    try:
        written = []
        for size in sizes:
            network = at_size(backbone, size, len(images.mean))
            facts = _facts(network, size, digest, images)
            example = _example(size, len(images.mean))
            whole = fresh / f"fp32-{size}.onnx"
            _export(network, example, whole, facts)
            for kind in [kind for kind in KINDS if kind in kinds]:
                path = fresh / f"{kind}-{size}.onnx"
                if kind == "fp16":
                    _export(network, example, path, facts, torch.float16)
                elif kind == "int8":
                    _quantise(whole, path, facts)
                error = _error(network, example, path)
                if not math.isfinite(error) or (kind == "fp32" and error > TOLERANCE):
                    raise PipelineError(
                        f"{path.name} gives other features than torch (up to {error:.2g} of the "
                        f"largest, allowed are {TOLERANCE:g})",
                        "try another version of onnxruntime or torch, and report it",
                    )
                parts = sum(part.stat().st_size for part in fresh.glob(f"{path.name}*"))
                written.append(OnnxFile(folder / path.name, kind, size, error, parts))
            if "fp32" not in kinds:
                for part in fresh.glob(f"{whole.name}*"):
                    part.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return written


def needs_packages() -> None:
    """Refuses to go on without the packages of the extra `onnx`.

    Raises:
        PipelineError: with the names of those that are missing.
    """
    from importlib.util import find_spec

    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise PipelineError(
            f"writing ONNX needs the packages {', '.join(missing)}, which are not installed",
            "from the clone: python -m pip install -c constraints.txt -e '.[onnx]'",
        )


def at_size(
    backbone: VisionTransformer | ForeignBackbone, size: int, channels: int
) -> VisionTransformer | ForeignBackbone:
    """A copy in eval mode whose position embeddings are those that the backbone has for images of
    `size` x `size` pixels.

    Raises:
        PipelineError: the backbone takes no such images.
    """
    network = copy.deepcopy(backbone).eval().requires_grad_(False)
    try:
        with torch.no_grad():
            if isinstance(network, VisionTransformer):
                network.pos_embed = nn.Parameter(network.position(size, size), requires_grad=False)
            elif isinstance(network, TimmBackbone) and hasattr(network.module, "set_input_size"):
                network.module.set_input_size(img_size=size)  # type: ignore[operator]
            same = torch.equal(
                network(_example(size, channels)), backbone(_example(size, channels))
            )
    except (RuntimeError, AssertionError, ValueError, PipelineError) as error:
        raise PipelineError(
            f"the backbone takes no images of {size} x {size} pixels: {one_line(error)}",
            "give export.onnx_sizes multiples of its patch size",
        ) from error
    if not same:
        raise PipelineError(
            f"position embeddings for {size} pixels are not those of the network itself",
            "leave this size out of export.onnx_sizes, and report it",
        )
    return network


class SessionModule(nn.Module):
    """A file as a network `[B, C, S, S]` to `[B, D]`, for the evaluation.

    Args:
        path: of the `.onnx` file.
        threads: of one call.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.names = [out.name for out in self.session.get_outputs()]

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        """`cls` `[B, D]` and, where there are patches, `patches` `[B, P, D]`."""
        arrays = self.session.run(self.names, {"image": x.float().cpu().numpy()})
        return {name: torch.from_numpy(a) for name, a in zip(self.names, arrays, strict=True)}

    def forward(self, x: Tensor) -> Tensor:
        """The CLS features."""
        return self.outputs(x)["cls"].to(x.device)


class _Outputs(nn.Module):
    """What goes into the file: float32 in and out, whatever is computed in."""

    def __init__(self, network: VisionTransformer | ForeignBackbone, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.network.forward_features(image.to(self.dtype))
        named = [features["x_norm_clstoken"], features["x_norm_patchtokens"]]
        return tuple(x.float() for x in named if x is not None)


def _names(network: VisionTransformer | ForeignBackbone) -> list[str]:
    return ["cls", "patches"] if network.has_patches else ["cls"]


def _example(size: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, size, size, generator=generator)


def _facts(
    network: VisionTransformer | ForeignBackbone, size: int, digest: str, images: Preprocessing
) -> dict[str, str]:
    facts: dict[str, Any] = {
        "mean": list(images.mean),
        "std": list(images.std),
        "image_size": size,
        "digest": digest,
        **({"patch_size": network.patch_size} if network.has_patches else {}),
        **deep_key(images.value_range),
    }
    return {name: x if isinstance(x, str) else json.dumps(x) for name, x in facts.items()}


def _export(
    network: VisionTransformer | ForeignBackbone,
    example: Tensor,
    path: Path,
    facts: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    module = _Outputs(network if dtype == torch.float32 else copy.deepcopy(network), dtype).eval()
    weights = sum(x.numel() * x.element_size() for x in module.state_dict().values())
    with _quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=2**16)}},
            input_names=["image"],
            output_names=_names(network),
            verbose=False,
        )
        program.model.metadata_props.clear()
        program.model.metadata_props.update(facts)
        program.save(str(path), external_data=weights > INLINE)


def _quantise(whole: Path, path: Path, facts: Mapping[str, str]) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(whole)
    del model.graph.value_info[:]  # shapes of matrices that are turned around meanwhile
    onnx.helper.set_model_props(model, dict(facts))
    external = any(whole.parent.glob(f"{whole.name}.*"))
    with tempfile.TemporaryDirectory(dir=whole.parent) as folder, _quiet():
        onnx.save(model, Path(folder, whole.name), save_as_external_data=external)
        quantize_dynamic(
            Path(folder, whole.name),
            path,
            op_types_to_quantize=["MatMul"],  # Gemm too, which it turns into them
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external,
        )


def _error(network: nn.Module, example: Tensor, path: Path) -> float:
    """On another number of images than the one that was exported with."""
    x = torch.cat([example, example.flip(2)[:1]])
    features = network.forward_features(x)  # type: ignore[operator]
    expected = {"cls": features["x_norm_clstoken"], "patches": features["x_norm_patchtokens"]}
    errors = [
        float((out - expected[name]).abs().max() / expected[name].abs().max())
        for name, out in SessionModule(path).outputs(x).items()
    ]
    return float(torch.tensor(errors).max())  # Python's max() would lose a NaN


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' advice."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
