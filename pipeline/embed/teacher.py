"""Any model as the frozen teacher of a distillation: looked up by the driver, opened by workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.embed.embedders import BACKBONE, DESCRIPTOR, ONNX, EmbedderSpec, embedder_of
from pipeline.embed.forward import check_channels, own_size
from pipeline.embed.load import load_teacher
from pipeline.embed.onnx.embedder import OnnxModel
from pipeline.embed.onnx.files import on_this_node, size_of
from pipeline.errors import PipelineError
from pipeline.images.value_range import ValueRange

if TYPE_CHECKING:
    from pipeline.model.encoders.frozen import FeatureTeacher


@dataclass(frozen=True)
class TeacherSource:
    """What `pipeline.train.distil.source.Source` says, of any model that `embedder_of` takes.

    Attributes:
        model: its name in full.
        spec: what the name means.
    """

    model: str
    spec: EmbedderSpec

    @property
    def digest(self) -> str:
        """Changes with the weights."""
        return self.spec.digest

    @property
    def value_range(self) -> ValueRange:
        """Values of deep images that became 0 to 255 in its training."""
        return self.spec.value_range

    @property
    def trained(self) -> bool:
        """Whether that range is known: of a run of ours."""
        return getattr(self.spec.load, "func", None) is load_teacher

    def open(
        self, mean: Sequence[float], std: Sequence[float], device: str, threads: int
    ) -> FeatureTeacher:
        """Loads it on the CPU, for views that are normalised by `mean` and `std`.

        Raises:
            PipelineError: it is gone, has other weights than when the run began, or does not fit
                the images.
        """
        from pipeline.model.encoders.frozen import FeatureTeacher, OutsideNetwork

        spec, views = self.spec, (mean, std)
        here = embedder_of(self.model, image_size=spec.image_size).digest
        if here != spec.digest:
            raise PipelineError(
                f"the teacher {spec.name} has other weights here than when the run began "
                f"({here}, not {spec.digest})",
                "put the weights back, or begin another run (run.name=…); all nodes must see the "
                "same file",
            )
        if spec.kind == ONNX:
            path, sizes = on_this_node(spec.path, spec.digest), (spec.image_size, spec.mean)
            cuda = device == "cuda"
            model = OnnxModel(path, *sizes, spec.std, threads=threads, gpu=cuda, name=spec.name)
            taken = model.signature.mean, model.signature.std
            network = OutsideNetwork(model.of_values, model.device, size_of(path))
            # the model normalises by itself: it is given values 0 to 1
            plain = tuple(0.0 for _ in taken[0]), tuple(1.0 for _ in taken[0])
            return FeatureTeacher(network, spec.name, model.signature.size, plain, views)
        assert spec.load is not None
        backbone = spec.load().float()
        check_channels(backbone, spec.name, len(spec.mean))
        size = spec.image_size or own_size(backbone)
        return FeatureTeacher(backbone, spec.name, size, (spec.mean, spec.std), views)


def teacher_of(
    model: str,
    image_size: int | None = None,
    folder: str = "runs",
    digest: str = "",
) -> TeacherSource:
    """The teacher that a name means.

    Args:
        model: as `embedder_of` takes it, but for `descriptor`.
        image_size: side of the images that it is shown; default: its own.
        folder: where runs are looked for by their name.
        digest: of its weights when the run began; "" at the beginning.

    Raises:
        PipelineError: there is nothing of that kind, or it has changed.
    """
    if model == DESCRIPTOR:
        raise PipelineError(
            "distill.teacher=descriptor: a descriptor is no network that has learnt anything",
            "name a run, weights, timm:<name> or a .onnx file",
        )
    spec = embedder_of(model, image_size=image_size, folder=folder)
    assert spec.kind in (BACKBONE, ONNX)
    if digest and spec.digest != digest:
        raise PipelineError(
            f"the teacher {spec.name} has other weights than when the run began "
            f"({spec.digest}, not {digest})",
            "put the weights back, or begin another run (run.name=…)",
        )
    return TeacherSource(model, spec)
