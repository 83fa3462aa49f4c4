"""The stream through real Ray Data: which bytes arrive where, for any number of workers."""

from __future__ import annotations

import math

import pytest
import ray
import torch

from pipeline.errors import DataError
from pipeline.shards.shards import ShardColumns
from pipeline.stream.dealer import DecodeTasks
from pipeline.stream.decoder import StreamSpec
from pipeline.stream.feeder import launch_feeder
from pipeline.stream.reader import Reading, reading_of
from pipeline.stream.worker import StreamRequest, batches
from pipeline.views.batch import Batch
from pipeline.views.crops import CropSpec
from pipeline.views.masks import MaskSpec
from pipeline.views.photometric import PhotometricSpec
from tests.data import encoded, hub_table, noise, stored

IMAGES, BATCH, CHUNK = 70, 12, 2
Source = tuple[Reading, StreamSpec]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("hub")
    images = [encoded(noise(i, 20 + i % 7, 24)) for i in range(IMAGES)]
    images[17] = b"not an image"
    for part in range(2):
        rows = range(part * 35, part * 35 + 35)
        table = hub_table([images[row] for row in rows], rows)
        shards = stored(table, folder / f"part-{part}.parquet", 10)
    reading = reading_of(shards, seed=5, global_batch=BATCH, window=BATCH)
    return reading, StreamSpec(
        columns=shards.columns,
        seed=5,
        global_batch=BATCH,
        steps_per_pass=reading.order.steps_per_pass,
        crops=CropSpec(global_size=16, local_size=8, local_crops=2),
        photometric=PhotometricSpec(),
        masks=MaskSpec((4, 4), 0.5, (0.1, 0.5)),
        chunk=CHUNK,
        max_pixels=10_000,
    )


def consume(source: Source, workers: int, first: int, last: int) -> list[list[Batch]]:
    """Each worker's batches, read side by side as a training group would."""
    feeder = launch_feeder(*source, last, DecodeTasks(0.9), workers)

    @ray.remote(num_cpus=0)
    def read(rank: int) -> list[Batch]:
        micro = BATCH // workers
        return list(batches(StreamRequest(feeder, "a", rank, workers, first, last), micro, CHUNK))

    taken = ray.get([read.remote(rank) for rank in range(workers)])
    ray.kill(feeder)
    return taken


def by_step(taken: list[list[Batch]]) -> list[dict[int, tuple[Batch, int]]]:
    """Per step: label (= row number) -> (batch, place in it)."""
    return [
        {label: (part, i) for part in parts for i, label in enumerate(part.labels.tolist())}
        for parts in zip(*taken, strict=True)
    ]


def same(one: tuple[Batch, int], two: tuple[Batch, int]) -> bool:
    (a, i), (b, j) = one, two
    return all(
        torch.equal(getattr(a, name)[i], getattr(b, name)[j])
        for name in ("image_ids", "global_crops", "local_crops", "photometric", "masks")
    )


def test_crops_and_steps_do_not_depend_on_workers_or_restarts(
    ray_cluster: None, source: Source
) -> None:
    steps = 12  # two passes of 5 steps and a part of a third
    whole = by_step(consume(source, 1, 0, steps))
    split = by_step(consume(source, 2, 0, steps))
    resumed = by_step(consume(source, 3, 7, steps))
    for step in range(steps):
        assert set(whole[step]) == set(split[step])
        assert all(same(whole[step][row], split[step][row]) for row in whole[step])
    for step in range(7, steps):
        assert set(whole[step]) == set(resumed[step - 7])
        assert all(same(whole[step][row], resumed[step - 7][row]) for row in whole[step])


def test_workers_get_the_same_rows_each_time(ray_cluster: None, source: Source) -> None:
    one, two = consume(source, 2, 0, 10), consume(source, 2, 0, 10)
    for a, b in zip(one, two, strict=True):
        assert [x.labels.tolist() for x in a] == [x.labels.tolist() for x in b]


def test_each_row_once_a_pass_and_the_bad_one_is_named(ray_cluster: None, source: Source) -> None:
    [taken] = consume(source, 1, 0, 5)
    labels = [label for batch in taken for label in batch.without_fillers().labels.tolist()]
    assert [batch.images for batch in taken] == [BATCH] * 5
    bad = [row for batch in taken for row in batch.bad]
    assert len(labels) == len(set(labels))
    assert len(labels) + len(bad) == 5 * BATCH
    assert 17 not in labels
    assert all(reason == "not_an_image" for _, reason, _ in bad)


def test_decoding_begins_before_the_first_batch_is_asked_for(
    ray_cluster: None, source: Source
) -> None:
    feeder = launch_feeder(*source, 5, DecodeTasks(0.9), 1)
    stream = batches(StreamRequest(feeder, "a", 0, 1, 0, 5), BATCH, CHUNK)
    ray.get(feeder.iterator.remote("a", 0, 0))  # the segment is open
    assert ray.get(feeder.all_decoded.remote("a", 0, 60))
    assert len(list(stream)) == 5
    ray.kill(feeder)


def test_the_feeder_comes_up_where_others_hold_all_cpus(ray_cluster: None, source: Source) -> None:
    @ray.remote
    class Other:
        def there(self) -> None: ...

    other = Other.options(num_cpus=ray.cluster_resources()["CPU"]).remote()  # type: ignore[attr-defined]
    ray.get(other.there.remote(), timeout=120)
    feeder = launch_feeder(*source, 5, DecodeTasks(0.9), 1)
    try:
        ray.get(feeder.release.remote(), timeout=120)
    finally:
        ray.kill(feeder)
        ray.kill(other)


def test_unpacked_sets_above_the_limit_are_refused(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stream.reader.UNPACKED_LIMIT", 10)
    with pytest.raises(DataError, match="not written by pack"):
        reading_of(source[0].shards, seed=0, global_batch=4, window=8)


@pytest.mark.parametrize(
    ("image_bytes", "store", "images"),
    [
        (50_000, math.inf, 192),  # 128 MiB of crops of 519 KiB: three chunks
        (50_000, 150 * 2**20, 128),  # a small store: half of it
        (50_000, 0, 64),  # never less than a chunk
        (6_000_000, math.inf, 64),  # 16 MiB of encoded images are less than a chunk
    ],
)
def test_the_portion_of_a_decode_task(image_bytes: float, store: float, images: int) -> None:
    """By hand, for ten crops of an image (531,552 bytes) in chunks of 64."""
    whole = StreamSpec(
        columns=ShardColumns("", "image", "label"),
        seed=0,
        global_batch=64,
        steps_per_pass=1,
        crops=CropSpec(),
        photometric=PhotometricSpec(),
        masks=MaskSpec((16, 16), 0.5, (0.1, 0.5)),
        chunk=64,
        max_pixels=10_000,
        image_bytes=image_bytes,
        store_bytes=store,
    )
    assert whole.portion_images == images
