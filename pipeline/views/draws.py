"""Uniform numbers that depend on a key and on nothing else.

What happens to an image in a pass is a function of (seed, pass, image id). A generator with state
cannot give that: its numbers depend on who asked before. Here a number is a hash of its key, so any
worker can compute the numbers of any image at any time, in any order and in any company.

The hash is the SplitMix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), applied once for every word of the key and twice for every counter.
"""

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

CROP_STREAM = 0  # crop boxes and flips
PHOTOMETRIC_STREAM = 1  # colour, blur, solarize

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the SplitMix64 increment
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1

Words = npt.NDArray[np.uint64]


def mix(x: Words) -> Words:
    """The SplitMix64 finaliser: a bijection of 64-bit words in which every input bit counts."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
    return x ^ (x >> np.uint64(31))


def _absorb(state: Words, word: Words) -> Words:
    # The increment makes the order of the words count and keeps a zero word from being a no-op.
    return mix((state + GOLDEN) ^ word)


def uniforms(
    seed: int,
    pass_index: int,
    image_ids: npt.NDArray[np.uint8],
    count: int,
    stream: int = 0,
) -> npt.NDArray[np.float64]:
    """Return `count` numbers in [0, 1) for each image, equal for equal keys on every machine.

    Args:
        seed: the seed of the run, any integer (taken modulo 2**64).
        pass_index: how often the data set has been gone through before.
        image_ids: uint8 [B, 16], the raw bytes of the image ids.
        count: numbers per image. Asking for more leaves the first ones as they are.
        stream: keeps the numbers of two uses apart, see `CROP_STREAM` and `PHOTOMETRIC_STREAM`.

    Returns:
        float64 [B, count], multiples of 2**-53.

    Raises:
        DataError: if the ids are not uint8 [B, 16].
    """
    if image_ids.ndim != 2 or image_ids.shape[1] != 16 or image_ids.dtype != np.uint8:
        raise DataError(
            f"image ids are {image_ids.dtype} {list(image_ids.shape)}, expected uint8 [B, 16]",
            hint="pass the 16 raw bytes of each id, not its 32 hexadecimal digits",
        )
    # "<u8" and not the machine's own order: the numbers must agree between machines.
    words = np.ascontiguousarray(image_ids).view("<u8").astype(np.uint64)
    state = np.zeros(len(words), np.uint64)
    for word in (seed, pass_index, stream):
        state = _absorb(state, np.full(len(words), word & _WORD, np.uint64))
    state = _absorb(_absorb(state, words[:, 0]), words[:, 1])
    counter = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    # Plain SplitMix64 walks one cycle of 2**64, on which the stretches of two images may overlap.
    # The second key moves each image to a cycle of its own.
    second_key = mix(state ^ _MULTIPLY_1)
    bits = mix(mix(state[:, None] + counter[None, :]) ^ second_key[:, None])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
