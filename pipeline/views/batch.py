"""What the data stream hands to a training step.

A `Batch` is what travels: uint8 crops with the numbers that say what to do with them. `Views` is
what the networks see: normalised float images, crop-major, i.e. all images' first crop, then all
images' second crop. Shapes and dtypes are checked once, when a batch is made; nothing checks them
later.

Shapes: B images, L local crops, S and s sides of global and local crops in pixels, P patches.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DataError, PipelineError
from pipeline.views.crops import GLOBAL_CROPS
from pipeline.views.masked import Masked
from pipeline.views.photometric import PARAMS, PhotometricSpec, apply_photometric

Apply = Callable[[Tensor, Tensor, PhotometricSpec, torch.dtype], Tensor]

BadImage = tuple[str, str, str]  # image id (hex), reason, detail

# Name, dtype and shape; B and L bind to the first size met, None is any size.
_COLUMNS: tuple[tuple[str, Any, tuple[int | str | None, ...]], ...] = (
    ("image_ids", np.uint8, ("B", 16)),
    ("global_crops", np.uint8, ("B", GLOBAL_CROPS, "S", "S", "C")),
    ("local_crops", np.uint8, ("B", "L", "s", "s", "C")),
    ("photometric", np.float32, ("B", "2+L", PARAMS)),
    ("masks", np.bool_, ("B", GLOBAL_CROPS, None)),
    ("labels", np.int64, ("B",)),
)


class Spent(NamedTuple):
    """What making some images took: seconds of one core (reading: of waiting), and how many.

    `crop_s` is all that a decoder does beside decoding: boxes, draws and masks too.
    """

    images: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0
    crop_s: float = 0.0
    retries: float = 0  # calls to storage that were tried again

    def plus(self, other: "Spent") -> "Spent":
        """Both together."""
        images, *took = (a + b for a, b in zip(self, other, strict=True))
        return Spent(int(images), *took)


@dataclass(frozen=True)
class Views:
    """The input of one forward pass, crop-major: row c * B + i is crop c of image i.

    Rows alone do not say how many images they are of. Without `images` an image has two global
    views, as the stream makes them; any other number, from two on, needs `images`. Without `masks`
    nothing is hidden, and iBOT has nothing to predict.

    Raises:
        PipelineError: the shapes do not fit each other, or leave the number of images open.
    """

    global_views: Tensor  # float [G B, C, S, S]
    # float [L B, C, s, s]; [0, ...] without local views
    local_views: Tensor = field(default_factory=lambda: torch.zeros(0))
    # bool [G B, P], true = hidden from the student; [G B, 0] without masks
    masks: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    images: int = 0  # B; 0: half of the global views
    # float32 [B]: 1 for an image that counts, 0 for one in the place of a bad one; None: all count
    weights: Tensor | None = None
    masked: Masked | None = None  # what iBOT scores, where the host knows; None: it is looked up

    def __post_init__(self) -> None:
        rows, local_rows = len(self.global_views), len(self.local_views)
        if not self.masks.numel():
            object.__setattr__(self, "masks", self.masks.new_zeros(rows, 0))
        images = self.images or rows // GLOBAL_CROPS
        views = rows // images if self.images else GLOBAL_CROPS
        problem = ""
        if self.global_views.ndim != 4 or (local_rows and self.local_views.ndim != 4):
            problem = "views are [rows, channels, height, width]"
        elif not self.global_views.is_floating_point():
            problem = f"global views are {self.global_views.dtype}, and must be normalised floats"
        elif local_rows and self.local_views.shape[1] != self.global_views.shape[1]:
            problem = "global and local views have different channels"
        elif self.masks.dtype != torch.bool or self.masks.ndim != 2 or len(self.masks) != rows:
            problem = f"masks are bool [global views, patches], not {self.masks.dtype}"
        elif images < 1 or views < 2 or rows != views * images or local_rows % images:
            problem = f"{rows} global and {local_rows} local views are not those of {images} images"
            problem += ", each with two global views or more"
        elif not self.images and images < 3 and not local_rows % rows:
            # The same rows are those of one global view an image, which there is no loss for.
            problem = f"{rows} global views may be two of each of {images} images, or one of {rows}"
        if problem:
            shapes = [list(x.shape) for x in (self.global_views, self.local_views, self.masks)]
            raise PipelineError(
                f"{problem} (global views {shapes[0]}, local views {shapes[1]}, masks {shapes[2]})",
                "give Views(…, images=B) with B * G global views, B * L local views and B * G masks"
                " of B images, ordered crop by crop; G is 2 or more",
            )
        object.__setattr__(self, "images", images)

    @classmethod
    def of(
        cls,
        global_views: Sequence[Tensor],
        local_views: Sequence[Tensor] = (),
        masks: Tensor | None = None,
    ) -> "Views":
        """From one tensor `[B, C, S, S]` for each view.

        Args:
            global_views: two or more.
            local_views: of smaller images.
            masks: bool `[G B, P]`, all images' first view, then all their second; None: none.

        Raises:
            PipelineError: fewer than two global views, or shapes that do not fit each other.
        """
        shapes = [[list(x.shape) for x in views] for views in (global_views, local_views)]
        alike = all(all(one == kind[0] for one in kind) for kind in shapes if kind)
        if len(global_views) < 2 or not alike or not shapes[0][0]:
            raise PipelineError(
                f"global views {shapes[0]} and local views {shapes[1]}, expected lists of "
                "[B, C, S, S] and [B, C, s, s]",
                "give two or more global views of the same images, and local views of one size",
            )
        device = global_views[0].device
        local = torch.cat(list(local_views)) if local_views else torch.zeros(0, device=device)
        no_masks = torch.zeros(0, 0, dtype=torch.bool, device=device)
        hidden = no_masks if masks is None else masks
        return cls(torch.cat(list(global_views)), local, hidden, len(global_views[0]))

    @property
    def global_crops(self) -> int:
        """Global views of an image, G."""
        return len(self.global_views) // self.images

    @property
    def local_crops(self) -> int:
        """Local views of an image, L."""
        return len(self.local_views) // self.images


@dataclass(frozen=True)
class Batch:
    """One step's images on one worker, image-major as the stream makes them.

    Read only: the crops may lie in the object store, where a write ends the process.

    An image that cannot be decoded keeps its row, so that no shape depends on it: a filler, the
    pixels and colour numbers of another image of its chunk, with weight 0 and nothing masked.
    """

    image_ids: Tensor  # uint8 [B, 16]
    global_crops: Tensor  # uint8 [B, 2, S, S, C]
    local_crops: Tensor  # uint8 [B, L, s, s, C]
    photometric: Tensor  # float32 [B, 2 + L, PARAMS]
    masks: Tensor  # bool [B, 2, P]
    labels: Tensor  # int64 [B], -1 = unknown
    bad: tuple[BadImage, ...] = ()  # images that cannot be used
    spent: Spent = field(default_factory=lambda: Spent())  # what making them took
    weights: Tensor | None = None  # float32 [B], 0 for a filler; None: there is none

    @property
    def images(self) -> int:
        """Number of images, B."""
        return len(self.image_ids)

    @classmethod
    def from_chunk(cls, chunk: Mapping[str, npt.NDArray[Any]]) -> "Batch":
        """Make a batch from the arrays of the stream.

        Args:
            chunk: arrays named and shaped like the fields, and `valid` bool [B]. Rows that are not
                valid become fillers and are listed in `bad`, with the text columns `reason` and
                `detail` [B] where the chunk has them. `spent` has the fields of `Spent` behind the
                first.

        Raises:
            DataError: naming the array that is missing or has another dtype or shape.
        """
        sizes: dict[str, int] = {}
        for name, dtype, shape in (*_COLUMNS, ("valid", np.bool_, ("B",))):
            if name not in chunk:
                raise DataError(f"a chunk has no {name!r} (found: {', '.join(chunk)})")
            _check(name, chunk[name], np.dtype(dtype), shape, sizes)
        valid = chunk["valid"]
        tensors = {name: _tensor(chunk[name]) for name, *_ in _COLUMNS}
        if not valid.all():
            tensors |= _with_fillers(tensors, valid)
        bad = tuple(
            (
                chunk["image_ids"][row].tobytes().hex(),
                str(chunk["reason"][row]) if "reason" in chunk else "undecodable",
                str(chunk["detail"][row]) if "detail" in chunk else "",
            )
            for row in np.flatnonzero(~valid)
        )
        took = chunk["spent"].tolist() if "spent" in chunk else ()
        return cls(**tensors, bad=bad, spent=Spent(len(valid), *took))

    @classmethod
    def concat(cls, batches: Sequence["Batch"], pin: bool = False) -> "Batch":
        """Put batches of the same crop sizes behind each other.

        Args:
            batches: one or more; a single one is handed on as it is, unless it is to be pinned.
            pin: into page-locked memory, from which a GPU copies while the host goes on.
        """
        if len(batches) == 1 and not pin:
            return batches[0]
        names = [name for name, *_ in _COLUMNS]
        if any(b.weights is not None for b in batches):
            names.append("weights")
            batches = [replace(b, weights=b.weights_or_ones) for b in batches]
        joined = {}
        for name in names:
            parts = [getattr(b, name) for b in batches]
            shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
            joined[name] = torch.empty(shape, dtype=parts[0].dtype, pin_memory=pin)
            torch.cat(parts, out=joined[name])
        spent = Spent()
        for batch in batches:
            spent = spent.plus(batch.spent)
        return cls(**joined, bad=tuple(row for b in batches for row in b.bad), spent=spent)

    @property
    def weights_or_ones(self) -> Tensor:
        """Float32 [B]."""
        return torch.ones(self.images) if self.weights is None else self.weights

    def without_fillers(self) -> "Batch":
        """The images that could be decoded."""
        if self.weights is None:
            return self
        rows = self.weights.nonzero()[:, 0]
        kept = {name: getattr(self, name)[rows] for name, *_ in _COLUMNS}
        return replace(self, **kept, weights=None)

    def split(self, parts: int) -> list["Batch"]:
        """Cut into micro-batches of consecutive images; the first one keeps `bad` and `spent`.

        Raises:
            DataError: if the images do not divide into equal parts.
        """
        if self.images % parts:
            raise DataError(f"a batch of {self.images} images does not divide into {parts} parts")
        size = self.images // parts
        return [self.take(start, start + size) for start in range(0, self.images, size)]

    def take(self, start: int, stop: int) -> "Batch":
        """The images from `start` up to `stop`; `bad` and `spent` go with the first one."""
        part = {name: getattr(self, name)[start:stop] for name, *_ in _COLUMNS}
        if self.weights is not None:
            part["weights"] = self.weights[start:stop]
        return Batch(**part, bad=self.bad, spent=self.spent) if start == 0 else Batch(**part)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """Move the tensors; the photometric numbers stay where they are.

        They are a plan that the host reads, so that colour needs no wait for the device; see
        `apply_photometric`.
        """
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor) and f.name != "photometric"
        }
        return replace(self, **moved)

    def views(
        self,
        spec: PhotometricSpec,
        dtype: torch.dtype = torch.float32,
        photometric: Apply = apply_photometric,
        masked: Masked | None = None,
    ) -> Views:
        """Apply colour, blur and solarize and normalise; see `Views` for the order of the rows.

        Args:
            spec: the one the parameters were drawn with.
            dtype: of the views.
            photometric: `apply_photometric` or a compiled form of it.
            masked: what iBOT scores, where it is known.
        """
        parameters = (self.photometric[:, :GLOBAL_CROPS], self.photometric[:, GLOBAL_CROPS:])
        global_views, local_views = (
            photometric(crop_major(crops), crop_major(p), spec, dtype)
            for crops, p in zip((self.global_crops, self.local_crops), parameters, strict=True)
        )
        masks = crop_major(self.masks)
        return Views(global_views, local_views, masks, self.images, self.weights, masked)


def crop_major(x: Tensor) -> Tensor:
    """`[B, V, …]` as `[V B, …]`: all images' first crop, then all images' second."""
    return x.transpose(0, 1).flatten(0, 1)


def _with_fillers(tensors: Mapping[str, Tensor], valid: npt.NDArray[np.bool_]) -> dict[str, Tensor]:
    """What changes where some rows are not valid: a copy, as a chunk is read only."""
    counts = torch.from_numpy(valid.copy())
    source = torch.where(counts, torch.arange(len(counts)), int(valid.argmax()))
    changed = {n: tensors[n][source] for n in ("global_crops", "local_crops", "photometric")}
    if not valid.any():  # black
        changed["global_crops"].zero_()
        changed["local_crops"].zero_()
    masks = tensors["masks"] & counts[:, None, None]
    return changed | {"masks": masks, "weights": counts.float()}


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    with warnings.catch_warnings():
        # Arrays out of Ray's object store are read-only, which torch cannot express. Nobody writes
        # to a batch, and a copy of the crops would cost more than all else on the way here.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _check(
    name: str,
    array: npt.NDArray[Any],
    dtype: np.dtype[Any],
    shape: tuple[int | str | None, ...],
    sizes: dict[str, int],
) -> None:
    """Compare with the expected dtype and shape; letters must mean one size in all arrays."""
    fits = array.dtype == dtype and array.ndim == len(shape)
    for expected, size in zip(shape, array.shape, strict=False):
        if expected == "2+L":
            expected = GLOBAL_CROPS + sizes["L"]
        elif isinstance(expected, str):
            expected = sizes.setdefault(expected, size)
        fits = fits and expected in (None, size)
    if not fits:
        expected_shape = ", ".join("*" if s is None else f"{s}" for s in shape)
        known = ", ".join(f"{key} = {value}" for key, value in sizes.items())
        raise DataError(
            f"{name} of a chunk is {array.dtype} {list(array.shape)}, "
            f"expected {dtype} [{expected_shape}] ({known})"
        )
