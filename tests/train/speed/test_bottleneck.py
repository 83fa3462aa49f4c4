"""Which stage limits, by planted numbers: each case says the stage and what to change."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.train.speed.bottleneck import BottleneckWatch, Feed, bottleneck, ms, per_image
from pipeline.views.batch import Spent

# wait, images/s, read, decode, crop ms, decoders
DECODE = Feed(0.4, 480, 0.1, 5.0, 3.0, 4)  # 480 x 8 ms = 3.84 of 4 cores
CROPS = Feed(0.4, 480, 0.1, 3.0, 5.0, 4)
READ = Feed(0.4, 100, 10.0, 1.0, 3.0, 4)  # a reader waits all the time, decoders work 0.4 of 4
STREAM = Feed(0.4, 100, 1.0, 1.0, 3.0, 4)


@pytest.mark.parametrize(
    ("feed", "stage", "said"),
    [
        (DECODE, "decoding", ["40 %", "4 decoders", "500 images/s", "decoding takes 5 of 8 ms"]),
        (DECODE, "decoding", ["CPU nodes", "resources.decode_tasks", "smaller stored images"]),
        (CROPS, "decoding", ["cutting crops takes 5 of 8 ms", "augment.local_crops"]),
        (READ, "reading", ["10 ms", "10 %", "faster storage", "data.row_group_images"]),
        (STREAM, "stream", ["10 %", "resources.object_store_gb", "blocks"]),
    ],
)
def test_each_stage(feed: Feed, stage: str, said: list[str]) -> None:
    limit = bottleneck(feed)
    assert limit and limit.stage == stage
    assert not [words for words in said if words not in limit.sentence], limit.sentence
    assert "\n" not in limit.sentence and not limit.sentence.endswith(".")


def test_scaled_decoding_is_named_where_it_is_off() -> None:
    def sentence(scaled: bool) -> str:
        limit = bottleneck(Feed(0.2, 120, 0, 5, 3, 1, scaled))
        assert limit
        return limit.sentence

    assert "data.scaled_decode=true" in sentence(False)
    assert "scaled" not in sentence(True)
    assert "1 decoder can give at most 125 images/s" in sentence(True)


@pytest.mark.parametrize("wait", [0.0, 0.05, 0.1])
def test_up_to_a_tenth_nothing_is_said(wait: float) -> None:
    assert bottleneck(Feed(wait, 480, 0.1, 5.0, 3.0, 4)) is None


def test_the_busier_one_is_named_where_both_are() -> None:
    both = Feed(0.5, 100, 30.0, 7.0, 1.0, 1)  # three readers' time, 0.8 of the decoder's
    limit = bottleneck(both)
    assert limit and limit.stage == "reading"
    limit = bottleneck(Feed(0.5, 100, 7.5, 7.0, 2.0, 1))
    assert limit and limit.stage == "decoding"


@settings(deadline=None, max_examples=200)
@given(
    st.floats(0, 1), st.floats(0, 1e5), st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1e4),
    st.integers(1, 1000),
)  # fmt: skip
def test_there_is_always_an_answer(
    wait: float, rate: float, read: float, decode: float, crop: float, decoders: int
) -> None:
    limit = bottleneck(Feed(wait, rate, read, decode, crop, decoders))
    assert (limit is None) == (wait <= 0.10)
    if limit and limit.stage == "decoding":
        most = re.search(r"at most ([\d,]+) images/s", limit.sentence)
        assert most and float(most[1].replace(",", "")) <= rate / 0.7 + 1


def test_milliseconds_of_an_image() -> None:
    metrics = per_image(Spent(200, 1.0, 0.5, 0.25))
    assert metrics == {"perf/read_ms": 5.0, "perf/decode_ms": 2.5, "perf/crop_ms": 1.25}
    assert set(per_image(Spent()).values()) == {0.0}
    assert [ms(x) for x in (0.1834, 2.44, 9.4, 93.2, 1234.0)] == [
        "0.18", "2.4", "9.4", "93", "1234"
    ]  # fmt: skip


def timing(wait: float, rate: float) -> dict[str, float]:
    return {"perf/data_wait_fraction": wait, "perf/images_per_s": rate}


def test_a_stage_is_said_once_until_another_limits() -> None:
    watch = BottleneckWatch(decode_tasks=4, scaled_decode=True)
    decoding, reading = Spent(100, 0.01, 0.5, 0.3), Spent(100, 1.0, 0.1, 0.3)
    assert watch.window(decoding, timing(0.05, 480)) == ""
    assert "decoders can give" in watch.window(decoding, timing(0.3, 480))
    assert watch.window(decoding, timing(0.4, 480)) == ""
    assert watch.window(decoding, timing(0.0, 480)) == ""
    assert watch.window(decoding, timing(0.2, 480)) == ""
    assert "reading limits" in watch.window(reading, timing(0.2, 100))
    assert "decoders can give" in watch.window(decoding, timing(0.3, 480))


def test_the_run_as_a_whole() -> None:
    watch = BottleneckWatch(decode_tasks=4, scaled_decode=True)
    summary = {"images_per_s": 480.0, "data_wait_fraction": 0.2}
    assert watch.whole(summary) == ""  # no window after the start
    for _ in range(3):
        watch.window(Spent(100, 0.01, 0.5, 0.3), timing(0.0, 480))
    assert "waits for data 20 % of the time: 4 decoders" in watch.whole(summary)
    assert watch.whole(summary | {"data_wait_fraction": 0.1}) == ""
    assert watch.whole({}) == ""
