"""The contract "randomness is data" without Ray: what an image becomes depends on its key only.

`complaints` compares a stream with another one that was cut, dealt or started in another way, and
names every rule that does not hold. The second half of this file takes one key at a time out of the
generators: each must make it complain.

The images show where a crop was cut: red is the column, green the row, blue tells images apart. So
two crops with equal red and green come from equal boxes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.shards.columns import image_id
from pipeline.shards.shards import ShardSet
from pipeline.stream import order
from pipeline.stream.decoder import StreamSpec, make_chunks
from pipeline.stream.reader import read_portions, reading_of
from pipeline.views import draws, masks
from pipeline.views.crops import CropSpec
from pipeline.views.masks import MaskSpec
from pipeline.views.photometric import PhotometricSpec, draw_photometric
from tests.data import encoded, hub_table, own_table, stored
from tests.views.test_draws import by_hand

IMAGES, SIDE, BROKEN = 40, 40, 23
CROPS = CropSpec(global_size=8, local_size=4, local_crops=2)
KEYS_OF_AN_IMAGE = ("crops", "colours")


@dataclass(frozen=True)
class Way:
    """How a stream is cut and dealt. `batch` and `window` fix the order, the others must not."""

    batch: int = 8
    window: int = 16
    chunk: int = 2
    portion: int = 3  # chunks
    workers: int = 1
    first: int = 0  # step
    seed: int = 5


@dataclass(frozen=True)
class Seen:
    """What all workers together received."""

    images: dict[tuple[int, str], dict[str, bytes]]  # (pass, image id): its crops and colours
    boxes: dict[tuple[int, str], bytes]  # red and green of the crops
    colours: dict[tuple[int, str], np.ndarray[Any, Any]]
    places: dict[tuple[int, int], str]  # (step, place in the global batch): image id
    masks: dict[tuple[int, int], bytes]
    twice: int  # images that came more than once in a pass


def photo(i: int) -> bytes:
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    pixels[..., 0] = 6 * np.arange(SIDE)
    pixels[..., 1] = 6 * np.arange(SIDE)[:, None]
    pixels[..., 2] = i
    return encoded(pixels)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Two files as a hub has them; one image is broken."""
    folder = tmp_path_factory.mktemp("hub")
    files = [photo(i) for i in range(IMAGES)]
    files[BROKEN] = b"not an image"
    for part, rows in enumerate((slice(0, 25), slice(25, IMAGES))):
        shards = stored(hub_table(files[rows]), folder / f"part-{part}.parquet", 9)
    return shards


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The same images as pack would write them: by id, with their sizes."""
    path = tmp_path_factory.mktemp("packed") / "part-00000.parquet"
    files = sorted((photo(i) for i in range(IMAGES) if i != BROKEN), key=image_id)
    sides = [SIDE] * len(files)
    shards = stored(own_table(files, width=sides, height=sides), path, 7)
    assert shards.packed
    return shards


def run(shards: ShardSet, way: Way, steps: int | None = None) -> Seen:
    """Two passes (or up to a step), as `way.workers` would receive them from the splitter."""
    order = replace(shards, packed=True)  # so that `window` counts for the hub's files too
    reading = reading_of(order, seed=way.seed, global_batch=way.batch, window=way.window)
    spec = StreamSpec(
        columns=shards.columns,
        seed=way.seed,
        global_batch=way.batch,
        steps_per_pass=reading.order.steps_per_pass,
        crops=CROPS,
        photometric=PhotometricSpec(),
        masks=MaskSpec((4, 4), 0.5, (0.1, 0.6)),
        chunk=way.chunk,
        max_pixels=10**6,
    )
    last = 2 * spec.steps_per_pass if steps is None else steps
    tasks = reading.tasks(way.first, last)
    portions = read_portions(tasks, spec.columns, spec.seed, way.portion * way.chunk)
    chunks = [chunk for portion in portions for chunk in make_chunks(portion, spec)]
    shares = [chunks[rank :: way.workers] for rank in range(way.workers)]  # as blocks are dealt
    seen = Seen({}, {}, {}, {}, {}, 0)
    twice, per_step = 0, way.batch // way.chunk
    for rank, share in enumerate(shares):
        for n, chunk in enumerate(share):
            step, chunk_in_step = divmod(n * way.workers + rank, per_step)
            step += way.first
            for i in range(way.chunk):
                name = chunk["image_ids"][i].tobytes().hex()
                image = step // spec.steps_per_pass, name
                place = step, chunk_in_step * way.chunk + i
                seen.places[place] = name
                seen.masks[place] = chunk["masks"][i].tobytes()
                twice += image in seen.images
                crops = [chunk["global_crops"][i], chunk["local_crops"][i]]
                colours = chunk["photometric"][i]
                pixels = b"".join(c.tobytes() for c in crops)
                seen.images[image] = dict(
                    zip(KEYS_OF_AN_IMAGE, (pixels, colours.tobytes()), strict=True)
                )
                if chunk["valid"][i]:
                    seen.boxes[image] = b"".join(c[..., :2].tobytes() for c in crops)
                    seen.colours[image] = colours
    return replace(seen, twice=twice)


def differences(one: Seen, two: Seen, *, masks: bool, order: bool) -> set[str]:
    """Rules for two streams of one seed; `order`: of one batch and window, so of one order."""
    complaints = set()
    common = one.images.keys() & two.images.keys()
    assert common
    for what in KEYS_OF_AN_IMAGE:
        if any(one.images[key][what] != two.images[key][what] for key in common):
            complaints.add(f"{what} depend on how the stream is cut")
    places = one.places.keys() & two.places.keys()
    if masks and any(one.masks[p] != two.masks[p] for p in places):
        complaints.add("masks depend on how the stream is cut")
    if order and any(one.places[p] != two.places[p] for p in places):
        complaints.add("the order depends on how the stream is cut")
    if one.twice or two.twice:
        complaints.add("an image came twice in a pass")
    return complaints


def repeats(seen: Seen, other_seed: Seen, seed: int) -> set[str]:
    """Rules inside one stream of two passes, and beside one of another seed."""
    complaints = set()

    def often(pairs: list[tuple[Any, Any]]) -> bool:
        """Chance may make a few equal (masks have few patches); a lost key makes nearly all."""
        assert len(pairs) > 5
        return sum(bool(np.array_equal(a, b)) for a, b in pairs) > 0.5 * len(pairs)

    for name, values in (("crops", seen.boxes), ("colours", seen.colours)):
        passes = [(values[0, i], values[1, i]) for p, i in values if p == 0 and (1, i) in values]
        if often(passes):
            complaints.add(f"{name} are the same in two passes")
        row = [values[key] for key in sorted(values) if key[0] == 0]
        if often(list(itertools.pairwise(row))):
            complaints.add(f"{name} are the same for two images")
        others = getattr(other_seed, "boxes" if name == "crops" else "colours")
        if often([(values[key], others[key]) for key in values.keys() & others.keys()]):
            complaints.add(f"{name} are the same for two seeds")
    if often([(seen.masks[p], other_seed.masks[p]) for p in seen.masks]):
        complaints.add("masks are the same for two seeds")
    steps = sorted({step for step, _ in seen.masks})
    width = 1 + max(place for _, place in seen.masks)

    def of_step(values: dict[tuple[int, int], Any], step: int) -> list[Any]:
        return [values[step, place] for place in range(width)]

    if often([(of_step(seen.masks, a), of_step(seen.masks, b)) for a, b in _pairs(steps)]):
        complaints.add("masks are the same in two steps")
    for step in steps:
        row = of_step(seen.masks, step)
        if len(set(row)) <= width // 2:
            complaints.add("masks are the same in two places")
    half = len(steps) // 2
    if all(of_step(seen.places, s) == of_step(seen.places, s + half) for s in steps[:half]):
        complaints.add("the order is the same in two passes")
    if seen.places == other_seed.places:
        complaints.add("the order is the same for two seeds")
    # The crop stream's numbers by the plain law: colours must not be made of them.
    numbers = CROPS.views * draws_of_colour(seen)
    for (pass_index, name), colours in list(seen.colours.items())[:3]:
        u = [by_hand(seed, pass_index, bytes.fromhex(name), n, 0) for n in range(numbers)]
        from_crops = draw_photometric(np.reshape(u, (1, CROPS.views, -1)), PhotometricSpec())
        if np.array_equal(from_crops[0], colours):
            complaints.add("colours are made of the numbers of crops")
    return complaints


def draws_of_colour(seen: Seen) -> int:
    from pipeline.views.photometric import PHOTOMETRIC_DRAWS

    return PHOTOMETRIC_DRAWS


def _pairs(values: list[int]) -> list[tuple[int, int]]:
    return [(a, b) for n, a in enumerate(values) for b in values[n + 1 :]]


def complaints(hub: ShardSet, packed: ShardSet) -> set[str]:
    """All rules, on a few ways that differ in one thing each."""
    way = Way()
    whole = run(hub, way)
    said = repeats(whole, run(hub, replace(way, seed=6)), way.seed)
    for other in (
        replace(way, workers=2),
        replace(way, chunk=4, portion=1),
        replace(way, chunk=1, portion=1),
        replace(way, first=3),
    ):
        said |= differences(whole, run(hub, other), masks=True, order=True)
    said |= differences(whole, run(hub, replace(way, window=8)), masks=True, order=False)
    said |= differences(
        whole, run(hub, replace(way, batch=12, window=24)), masks=False, order=False
    )
    return said | differences(whole, run(packed, way), masks=True, order=False)


@st.composite
def ways(draw: Any) -> Way:
    workers = draw(st.sampled_from([1, 2, 3]))
    batch = workers * draw(st.sampled_from([2, 4, 6]))
    window = draw(
        st.sampled_from([batch, 2 * batch, *(d for d in range(2, batch) if batch % d == 0)])
    )
    chunks = [d for d in range(1, batch + 1) if (batch // workers) % d == 0 and window % d == 0]
    per_pass = (IMAGES - 1) // batch  # of the packed set, which is the smaller one
    return Way(
        batch=batch,
        window=window,
        chunk=draw(st.sampled_from(chunks)),
        portion=draw(st.integers(1, 5)),
        workers=workers,
        first=draw(st.integers(0, per_pass)),
    )


@pytest.mark.long
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(way=ways(), from_pack=st.booleans())
def test_an_image_is_the_same_bytes_however_the_stream_is_cut(
    way: Way, from_pack: bool, hub: ShardSet, packed: ShardSet
) -> None:
    """Against plain reading by one worker, from the start, in another order."""
    shards = packed if from_pack else hub
    streamed = run(shards, way)
    assert not differences(run(hub, Way()), streamed, masks=way.batch == Way().batch, order=False)
    plain = Way(batch=way.batch, window=way.window, chunk=1, portion=1)
    assert not differences(run(shards, plain), streamed, masks=True, order=True)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(way=ways(), stops=st.sets(st.integers(1, 12), max_size=3), data=st.data())
def test_stops_and_other_numbers_of_workers_lose_and_repeat_nothing(
    way: Way, stops: set[int], data: Any, hub: ShardSet
) -> None:
    way = replace(way, first=0)
    whole = run(hub, way)
    last = 1 + max(step for step, _ in whole.places)
    edges = [0, *sorted(s for s in stops if s < last), last]
    places: dict[tuple[int, int], str] = {}
    for first, end in itertools.pairwise(edges):
        fits = [w for w in (1, 2, 3) if way.batch % w == 0 and way.batch // w % way.chunk == 0]
        part = replace(way, first=first, workers=data.draw(st.sampled_from(fits)))
        seen = run(hub, part, end)
        assert not differences(whole, seen, masks=True, order=True)
        assert not places.keys() & seen.places.keys()
        places |= seen.places
    assert places == whole.places
    for pass_index in range(2):
        steps = range(pass_index * last // 2, (pass_index + 1) * last // 2)
        names = [name for (step, _), name in places.items() if step in steps]
        assert len(names) == len(set(names)) == IMAGES // way.batch * way.batch


def test_nothing_to_complain_about(hub: ShardSet, packed: ShardSet) -> None:
    assert complaints(hub, packed) == set()


def without_uniforms(key: str) -> Callable[..., Any]:
    """`draws.uniforms` with one of its keys gone."""

    def broken(
        seed: int, pass_index: int, ids: np.ndarray[Any, Any], count: int, stream: int = 0
    ) -> Any:
        if key == "image id":
            ids = np.zeros_like(ids)
        return draws.uniforms(
            0 if key == "seed" else seed,
            0 if key == "pass" else pass_index,
            ids,
            count,
            0 if key == "stream" else stream,
        )

    return broken


def counting_uniforms() -> Callable[..., Any]:
    """A generator with state in place of a key: numbers depend on who asked before."""
    rng = np.random.default_rng(0)

    def broken(seed: int, pass_index: int, ids: Any, count: int, stream: int = 0) -> Any:
        return rng.random((len(ids), count))

    return broken


def without_masks(key: str) -> Callable[..., Any]:
    """`masks.masks_for` with one of its keys gone, or with the place in the chunk as the place."""

    def broken(seed: int, step: int, places: Any, *others: Any) -> Any:
        if key == "place":
            places = np.zeros_like(places)
        elif key == "global place":
            places = np.arange(len(places))
        return masks.masks_for(
            0 if key == "seed" else seed, 0 if key == "step" else step, places, *others
        )

    return broken


def without_order(key: str) -> Callable[..., Any]:
    original = order.keyed

    def broken(seed: int, pass_index: int, *others: Any) -> Any:
        return original(0 if key == "seed" else seed, 0 if key == "pass" else pass_index, *others)

    return broken


CUT = "depend on how the stream is cut"
FAULTS = [
    ("decoder.uniforms", without_uniforms, "seed", {"crops are the same for two seeds",
                                                   "colours are the same for two seeds"}),
    ("decoder.uniforms", without_uniforms, "pass", {"crops are the same in two passes",
                                                   "colours are the same in two passes"}),
    ("decoder.uniforms", without_uniforms, "image id", {"crops are the same for two images",
                                                       "colours are the same for two images"}),
    ("decoder.uniforms", without_uniforms, "stream", {"colours are made of the numbers of crops"}),
    ("decoder.masks_for", without_masks, "seed", {"masks are the same for two seeds"}),
    ("decoder.masks_for", without_masks, "step", {"masks are the same in two steps"}),
    ("decoder.masks_for", without_masks, "place", {"masks are the same in two places"}),
    ("decoder.masks_for", without_masks, "global place", {f"masks {CUT}"}),
    ("order.keyed", without_order, "seed", {"the order is the same for two seeds"}),
    ("order.keyed", without_order, "pass", {"the order is the same in two passes"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "broken", "key", "expected"), FAULTS)
def test_a_lost_key_is_noticed(
    name: str,
    broken: Callable[[str], Callable[..., Any]],
    key: str,
    expected: set[str],
    hub: ShardSet,
    packed: ShardSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"pipeline.stream.{name}", broken(key))
    said = complaints(hub, packed)
    assert expected <= said
    if key != "global place":  # one lost key is not taken for another one
        assert not any(CUT in complaint for complaint in said)


def test_a_generator_with_state_is_noticed(
    hub: ShardSet, packed: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stream.decoder.uniforms", counting_uniforms())
    assert {f"crops {CUT}", f"colours {CUT}"} <= complaints(hub, packed)


def test_a_row_that_is_dealt_twice_is_noticed(
    hub: ShardSet, packed: ShardSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = order.slice_rows

    def broken(window_slice: Any, seed: int) -> Any:
        which, rows = original(window_slice, seed)
        which[-1], rows[-1] = which[0], rows[0]
        return which, rows

    monkeypatch.setattr("pipeline.stream.reader.slice_rows", broken)
    assert "an image came twice in a pass" in complaints(hub, packed)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_windows_that_are_too_large_to_hold_two_are_fetched_one_by_one(
    limit: int, hub: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same portions; how many windows are in memory is counted where they are fetched."""
    from pipeline.stream import reader as module

    plain = run(hub, Way())
    monkeypatch.setattr(module, "AHEAD_BYTES", limit)
    assert run(hub, Way()).images == plain.images

    fetched: list[str] = []
    original = module.read_group
    monkeypatch.setattr(
        module, "read_group", lambda *args: (fetched.append(args[1]), original(*args))[1]
    )
    shards = replace(hub, packed=True)
    tasks = reading_of(shards, seed=0, global_batch=8, window=16).tasks(0, 4)
    portions = read_portions(tasks, shards.columns, 0, 4)
    next(portions)
    expected = len(tasks[0].places) + (len(tasks[1].places) if limit else 0)
    end = time.monotonic() + 30
    while len(fetched) < expected and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)  # one window too many would be fetched by now
    assert len(fetched) == expected
    assert sum(len(portion) for portion in portions) == 28
