"""What images become before a network takes them, as it stands beside weights."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.images.value_range import FULL, ValueRange


@dataclass(frozen=True)
class Preprocessing:
    """What images become; None and () where nobody says.

    Attributes:
        image_size: side of the middle square that is cut out, pixels.
        mean: of each channel, for pixels in 0 to 1.
        std: deviation of each channel.
        value_range: of images of more than 8 bits, that becomes 0 to 255.
    """

    image_size: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    value_range: ValueRange = FULL
