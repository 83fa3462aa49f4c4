"""Reads and writes at an S3 API that fails on purpose; what is in the bucket by boto3's word."""

from __future__ import annotations

import hashlib
import io
import random
import socket
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayTaskError

from pipeline.errors import DataError, PipelineError, StorageError
from pipeline.pack.items import read_task
from pipeline.pack.listing import Refused, list_source
from pipeline.pack.sources import Reading, Task
from pipeline.shards.row_group import read_row_group
from pipeline.shards.shards import open_shards
from pipeline.storage import places as storage
from pipeline.storage import retry, transfer
from pipeline.storage.places import resolve_uri
from pipeline.storage.retry import explain, retries, with_retries
from tests.data import own_table
from tests.s3 import HANG_S, S3, serving

BIG = 24 * 2**20  # bytes: three parts of an upload
CONTENT = random.Random(0).randbytes(BIG)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.002)


@pytest.fixture
def bucket(s3: S3, request: pytest.FixtureRequest) -> str:
    return s3.make("b" + hashlib.blake2b(request.node.name.encode(), digest_size=8).hexdigest())


def names(s3: S3, bucket: str) -> list[str]:
    return sorted(name for name in s3.objects(bucket) if not name.endswith("/"))


# ---- reading

FAILURES = [503, 500, 429, "reset", "cut"]


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("times", [1, 3])
def test_a_read_goes_through_and_its_tries_are_counted(
    s3: S3, bucket: str, kind: int | str, times: int
) -> None:
    fs, path = resolve_uri(f"s3://{bucket}/a.bin")
    transfer.write_bytes_atomic(b"12345" * 1000, fs, path)
    before = retries()
    with s3.broken("^GET", kind, times=times) as fault:
        assert transfer.read_bytes(fs, path) == b"12345" * 1000
    assert fault.done == times
    assert retries() - before == times


@pytest.mark.long
def test_an_answer_that_does_not_come_is_a_failure(
    s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ANSWER_S", 3.0)
    fs, path = resolve_uri(f"s3://{bucket}/a.bin")
    transfer.write_bytes_atomic(b"12345" * 1000, fs, path)
    before, begin = retries(), time.monotonic()
    with s3.broken("^GET", "hang") as fault:
        assert transfer.read_bytes(fs, path) == b"12345" * 1000
    assert fault.done == retries() - before == 1
    assert time.monotonic() - begin < HANG_S


def test_nothing_is_counted_where_nothing_fails(s3: S3, bucket: str) -> None:
    fs, path = resolve_uri(f"s3://{bucket}/a.bin")
    before = retries()
    transfer.write_bytes_atomic(b"x", fs, path)
    assert transfer.read_bytes(fs, path) == b"x"
    with pytest.raises(FileNotFoundError):
        transfer.read_bytes(fs, path + "x")
    assert retries() == before


def test_storage_that_stays_away_is_one_sentence(s3: S3, bucket: str) -> None:
    fs, path = resolve_uri(f"s3://{bucket}/a.bin")
    transfer.write_bytes_atomic(b"x", fs, path)
    before = retries()
    with s3.broken("^GET", 503, times=100) as fault, pytest.raises(StorageError) as caught:
        transfer.read_bytes(fs, path)
    assert fault.done == retry.TRIES
    assert retries() - before == retry.TRIES - 1
    what = caught.value.what
    assert what.startswith(f"reading {bucket}/a.bin failed {retry.TRIES} times: ")
    assert "\n" not in what
    assert caught.value.passing


def test_each_read_of_a_long_file_is_tried_again(s3: S3, bucket: str, tmp_path: Path) -> None:
    s3.client().put_object(Bucket=bucket, Key="big", Body=CONTENT)
    fs, path = resolve_uri(f"s3://{bucket}/big")
    before = retries()
    with s3.broken("^GET", "cut", skip=1, times=2) as fault:
        transfer.download(fs, path, tmp_path / "big")
    assert fault.done == retries() - before == 2
    assert (tmp_path / "big").read_bytes() == CONTENT


def test_a_patient_file_is_a_file(s3: S3, bucket: str) -> None:
    """Seeks and reads against io.BytesIO."""
    s3.client().put_object(Bucket=bucket, Key="a", Body=CONTENT[:100_000])
    draw = random.Random(1)
    mine, other = (
        transfer.open_patiently(*resolve_uri(f"s3://{bucket}/a")),
        io.BytesIO(CONTENT[:100_000]),
    )
    with mine, s3.broken("^GET", 503, skip=1, times=3):
        for _ in range(50):
            offset, whence = draw.randrange(110_000), draw.choice([0, 2])
            offset = -min(offset, 100_000) if whence == 2 else offset
            assert mine.seek(offset, whence) == other.seek(offset, whence)
            size = draw.randrange(20_000)
            assert mine.read(size) == other.read(size)
            assert mine.tell() == other.tell()


# ---- writing


@pytest.mark.parametrize("kind", [503, "reset"])
@pytest.mark.parametrize("part", [1, 2, 3])
def test_one_bad_part_is_sent_again(
    s3: S3, bucket: str, kind: int | str, part: int, tmp_path: Path
) -> None:
    (tmp_path / "big").write_bytes(CONTENT)
    s3.requests.clear()
    with s3.broken(f"^PUT.*partNumber={part}&", kind) as fault:
        transfer.upload(tmp_path / "big", *resolve_uri(f"s3://{bucket}/big"))
    assert fault.done == 1
    assert s3.read(bucket, "big") == CONTENT
    assert sum("partNumber=" in r for r in s3.requests) == 4  # three parts, one of them twice


@pytest.mark.long
@pytest.mark.parametrize("where", ["^POST.*uploads", "^PUT.*partNumber=2&", "^POST.*uploadId"])
def test_a_write_that_fails_for_good_leaves_what_was_there(
    s3: S3, bucket: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PART_TRIES", 1)
    (tmp_path / "big").write_bytes(CONTENT)
    fs, path = resolve_uri(f"s3://{bucket}/old")
    transfer.write_bytes_atomic(b"old", fs, path)
    with s3.broken(where, 503, times=1000):
        for name in ("old", "new"):
            with pytest.raises(StorageError, match=f"writing {bucket}/{name} failed 4 times"):
                transfer.upload(tmp_path / "big", *resolve_uri(f"s3://{bucket}/{name}"))
    assert s3.objects(bucket) == {"old": 3}
    transfer.upload(tmp_path / "big", fs, path)  # and later it works
    assert s3.read(bucket, "old") == CONTENT


def test_an_error_of_the_writer_uploads_nothing(s3: S3, bucket: str) -> None:
    """pyarrow's own streams complete an upload when an exception closes them."""
    fs, path = resolve_uri(f"s3://{bucket}/a")
    with pytest.raises(KeyError), transfer.atomic_path(fs, path) as temporary:
        Path(temporary).write_bytes(b"half")
        raise KeyError
    schema = pa.schema([("x", pa.int64())])
    with pytest.raises(KeyError), transfer.parquet_writer_atomic(schema, fs, path) as writer:
        writer.write_table(pa.table({"x": [1]}))
        raise KeyError
    assert s3.objects(bucket) == {}


def test_a_file_that_becomes_shorter_is_not_uploaded_in_part(
    s3: S3, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"123")
    with pytest.raises(EOFError):
        transfer.upload(tmp_path / "a", *resolve_uri(f"s3://{bucket}/a"), size=4)
    assert s3.objects(bucket) == {}
    transfer.upload(tmp_path / "a", *resolve_uri(f"s3://{bucket}/a"), size=2)
    assert s3.read(bucket, "a") == b"12"


# ---- who may, and where


def test_wrong_keys_are_one_sentence_at_once(s3: S3, bucket: str) -> None:
    s3.check_keys = True
    before = retries()
    wrong = s3.uri(f"{bucket}/a", key="wrong")
    fs, path = resolve_uri(wrong)
    calls = [
        lambda: transfer.read_bytes(fs, path),
        lambda: transfer.write_bytes_atomic(b"x", fs, path),
        lambda: storage.list_files(fs, bucket),
        lambda: open_shards(wrong),
        lambda: list_source(wrong),
    ]
    for call in calls:
        with pytest.raises(StorageError) as caught:
            call()
        assert "was refused" in caught.value.what
        assert "\n" not in caught.value.what
        assert "AWS_ACCESS_KEY_ID" in caught.value.hint
        assert "testsecret" not in str(caught.value)
        assert not caught.value.passing
    assert retries() == before


def test_no_such_bucket(s3: S3) -> None:
    fs, path = resolve_uri("s3://nobody-made-this/a")
    with pytest.raises(StorageError, match="there is no such bucket"):
        transfer.write_bytes_atomic(b"x", fs, path)
    with pytest.raises(DataError, match="no such path: s3://nobody-made-this/a"):
        open_shards("s3://nobody-made-this/a")


def test_nobody_answers() -> None:
    uri = "s3://bucket/a?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    with pytest.raises(StorageError, match=r"failed 3 times: Could not connect to server"):
        open_shards(uri)


def test_keys_of_a_uri_are_not_shown(s3: S3, bucket: str) -> None:
    for uri in (s3.uri(f"{bucket}/none"), "s3://K:S@bucket/a?no_such=1", "zz://K:S@bucket/a"):
        with pytest.raises(DataError) as caught:
            open_shards(uri)
        assert "K:S" not in str(caught.value)
        assert "testsecret" not in str(caught.value)


# ---- what passes and what does not


AWS = "When x: AWS Error {} during GetObject operation: said (Request ID: 1)"


@pytest.mark.parametrize(
    ("text", "passing"),
    [
        (AWS.format("SLOW_DOWN"), True),
        (AWS.format("UNKNOWN (HTTP status 503)"), True),
        (AWS.format("UNKNOWN (HTTP status 429)"), True),
        (AWS.format("UNKNOWN (HTTP status 400)"), False),
        (AWS.format("UNKNOWN (HTTP status 403)"), False),
        (AWS.format("ACCESS_DENIED"), False),
        (AWS.format("NO_SUCH_BUCKET"), False),
        (AWS.format("NO_SUCH_KEY"), False),
        ("[Errno 110] Connection timed out", True),
        ("google::cloud::Status(UNAVAILABLE: x)", True),
        ("[Errno 28] No space left on device", None),
        ("[Errno 13] Permission denied: '/data'", None),
    ],
)
def test_which_errors_pass(text: str, passing: bool | None) -> None:
    failure = explain("reading x", OSError(text))
    assert (failure.passing if failure else None) == passing


def test_other_errors_come_as_they_are() -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    before = retries()
    with pytest.raises(OSError, match="No space left") as caught:
        with_retries("writing", full)
    assert not isinstance(caught.value, PipelineError)
    assert retries() == before


@given(st.integers(0, 20), st.integers(1, 10))
def test_tries_are_limited_and_counted(failures: int, tries: int) -> None:
    left = [failures]

    def call() -> str:
        if left[0]:
            left[0] -= 1
            raise TimeoutError("timed out")
        return "done"

    before, pauses = retries(), []
    sleep, retry.time.sleep = retry.time.sleep, pauses.append
    try:
        result = with_retries("x", call, tries)
    except StorageError:
        result = "failed"
    finally:
        retry.time.sleep = sleep
    assert result == ("done" if failures < tries else "failed")
    assert retries() - before == min(failures, tries - 1) == len(pauses)
    for at, pause in enumerate(pauses):
        whole = min(retry.LONGEST_PAUSE_S, retry.FIRST_PAUSE_S * 2**at)
        assert whole / 2 <= pause <= whole


def test_a_storage_error_travels_through_ray() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(StorageError("what", "hint", passing=True)))
    assert (error.what, error.hint, error.passing) == ("what", "hint", True)
    again = RayTaskError("f", "Traceback\nStorageError: what", error).as_instanceof_cause()
    assert isinstance(again, StorageError)


# ---- shards and sources


def shard(s3: S3, bucket: str, rows: int = 20) -> list[bytes]:
    images = [bytes([i]) * 100 for i in range(rows)]
    body = io.BytesIO()
    pq.write_table(own_table(images, range(rows)), body, row_group_size=5)
    s3.client().put_object(Bucket=bucket, Key="set/part-00000.parquet", Body=body.getvalue())
    return images


@pytest.mark.parametrize("kind", [503, "cut"])
def test_row_groups_are_read_through_failures(s3: S3, bucket: str, kind: int | str) -> None:
    images = shard(s3, bucket)
    shards = open_shards(f"s3://{bucket}/set/part-00000.parquet")
    before = retries()
    with s3.broken("^GET", kind, skip=3, times=3) as fault:
        groups = [read_row_group(shards, 0, group) for group in range(4)]
    assert fault.done == retries() - before == 3
    assert [g.image(i) for g in groups for i in range(5)] == images
    assert np.concatenate([g.labels for g in groups]).tolist() == list(range(20))


def test_columns_are_read_through_failures(s3: S3, bucket: str) -> None:
    """Where a stage reads a file batch by batch, and so cannot begin the whole call again."""
    images = shard(s3, bucket)
    before = retries()
    shards = open_shards(f"s3://{bucket}/set/part-00000.parquet")
    with shards.parquet(0) as parquet, s3.broken("^GET", 503, times=3) as fault:
        batches = list(parquet.iter_batches(5, columns=["image", "label"]))
    assert fault.done == retries() - before == 3
    table = pa.Table.from_batches(batches)
    assert table.column("image").to_pylist() == images
    assert table.column("label").to_pylist() == list(range(20))


def archive(images: list[bytes]) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for i, image in enumerate(images):
            member = tarfile.TarInfo(f"c/{i:03d}.png")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    return body.getvalue()


def items(uri: str, task: Task) -> list[object]:
    fs, root = resolve_uri(uri)
    pieces = read_task(fs, root, task, Reading("image", "label", 2**30))
    return [item for piece, _ in pieces for item in piece]


def test_an_archive_is_read_through_failures(s3: S3, bucket: str) -> None:
    """A broken connection is no end of the archive."""
    images = [CONTENT[i * 2**20 : (i + 1) * 2**20] for i in range(12)]
    s3.client().put_object(Bucket=bucket, Key="src/a.tar", Body=archive(images))
    before = retries()
    with s3.broken("^GET", "cut", skip=1, times=2) as fault:
        members = items(f"s3://{bucket}/src", Task("archive", ("a.tar",)))
    assert fault.done == retries() - before == 2
    assert [item.encoded for item in members] == images  # type: ignore[attr-defined]


def test_storage_that_is_away_makes_no_bad_images(s3: S3, bucket: str) -> None:
    for name in ("a.png", "b.png"):
        s3.client().put_object(Bucket=bucket, Key=f"src/{name}", Body=b"x" * 500)
    task = Task("files", ("a.png", "b.png"))
    with s3.broken("^GET", 503, times=1000), pytest.raises(StorageError):
        items(f"s3://{bucket}/src", task)
    # an object that nobody may read is one bad image
    with s3.broken("^GET.*b.png", 403, times=1000):
        pieces = items(f"s3://{bucket}/src", task)
    assert isinstance(pieces[1], Refused)
    assert pieces[1].reason == "unreadable"
    assert not isinstance(pieces[0], Refused)


def test_a_server_of_ones_own_ends(tmp_path: Path) -> None:
    with serving() as server:
        server.make("one")
    with pytest.raises(ConnectionRefusedError):  # nobody listens there any more
        socket.create_connection(("127.0.0.1", server.port), timeout=30)
