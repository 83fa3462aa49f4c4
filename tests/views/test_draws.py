import numpy as np
import pytest
from scipy import stats

from pipeline.errors import DataError
from pipeline.views.draws import uniforms


def ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


def by_hand(seed: int, pass_index: int, image_id: bytes, counter: int, stream: int) -> float:
    """The same law in Python integers, one number at a time."""
    word = 2**64 - 1
    golden = 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    state = 0
    halves = (int.from_bytes(image_id[:8], "little"), int.from_bytes(image_id[8:], "little"))
    for part in (seed, pass_index, stream, *halves):
        state = mix(((state + golden) & word) ^ (part & word))
    bits = mix(mix((state + (counter + 1) * golden) & word) ^ mix(state ^ 0xBF58476D1CE4E5B9))
    return (bits >> 11) / 2**53


def test_equals_the_law_computed_with_python_integers():
    images = ids(3)
    u = uniforms(-7, 2, images, 5, stream=1)
    for row, image in enumerate(images):
        expected = [by_hand(-7, 2, image.tobytes(), counter, 1) for counter in range(5)]
        assert u[row].tolist() == expected


def test_splitmix_finaliser_is_the_published_one():
    # First outputs of SplitMix64 seeded with 1234567 (Vigna's reference program).
    from pipeline.views import draws

    state = (np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * draws.GOLDEN).astype(np.uint64)
    assert draws.mix(state).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("structured", [False, True])
def test_numbers_are_uniform_along_images_and_along_counters(structured):
    images = ids(20_000)
    if structured:  # ids that differ in a few low bits only, the hard case for a hash
        images = np.zeros((20_000, 16), np.uint8)
        images[:, :4] = np.arange(20_000, dtype="<u4").view(np.uint8).reshape(-1, 4)
    u = uniforms(0, 0, images, 8)
    assert u.min() >= 0 and u.max() < 1
    p_values = [stats.kstest(u[:, i], "uniform").pvalue for i in range(8)]
    p_values += [stats.kstest(uniforms(0, 0, images[:1], 20_000)[0], "uniform").pvalue]
    assert min(p_values) > 1e-4
    counts = np.histogram2d(u[:, 0], u[:, 1], bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4  # pairs fill the square evenly
    correlation = np.corrcoef(u.T) - np.eye(8)
    assert abs(correlation).max() < 5 / np.sqrt(20_000)


def test_an_image_gets_the_same_numbers_in_any_company_and_order():
    images = ids(50)
    u = uniforms(3, 1, images, 12)
    order = np.random.default_rng(1).permutation(50)
    np.testing.assert_array_equal(uniforms(3, 1, images[order], 12), u[order])
    np.testing.assert_array_equal(uniforms(3, 1, images[17:18], 12)[0], u[17])
    np.testing.assert_array_equal(uniforms(3, 1, images, 5), u[:, :5])
    np.testing.assert_array_equal(uniforms(3, 1, images[::2], 12), u[::2])  # not contiguous


def test_every_part_of_the_key_changes_all_numbers():
    images = ids(200)
    u = uniforms(3, 1, images, 12, stream=0)
    others = [
        uniforms(4, 1, images, 12),
        uniforms(3, 2, images, 12),
        uniforms(1, 3, images, 12),  # seed and pass exchanged
        uniforms(3, 1, images, 12, stream=1),
    ]
    for byte in range(16):
        changed = images.copy()
        changed[:, byte] ^= 1
        others.append(uniforms(3, 1, changed, 12))
    for other in others:
        assert not (other == u).any()
        assert abs(np.corrcoef(other.ravel(), u.ravel())[0, 1]) < 0.1


def test_no_images_and_wrong_ids():
    assert uniforms(0, 0, ids(0), 4).shape == (0, 4)
    with pytest.raises(DataError, match=r"int64 \[2, 16\], expected uint8 \[B, 16\]"):
        uniforms(0, 0, np.zeros((2, 16), np.int64), 4)
    with pytest.raises(DataError, match="hexadecimal"):
        uniforms(0, 0, np.zeros((2, 32), np.uint8), 4)
