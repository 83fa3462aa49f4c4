"""The working copy of a remote run folder: what is fetched, what is pushed, and in which order."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.storage import mirror as mirrors
from pipeline.storage import retry
from pipeline.storage.mirror import Mirror, mirrored, upload_folder
from pipeline.storage.run_folder import RunFolder, home
from pipeline.track.state import State, forget_local
from pipeline.uri import join, parent, public
from tests.s3 import S3

BUCKET, RUN = "mirrors", "s3://mirrors/runs/one"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.002)
    monkeypatch.setenv("RAYDINO_HOME", str(tmp_path / "home"))


@pytest.fixture
def bucket(s3: S3) -> S3:
    s3.make(BUCKET)
    for name in s3.objects(BUCKET):
        s3.client().delete_object(Bucket=BUCKET, Key=name)
    return s3


def write(folder: Path, name: str, text: str = "x") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def there(s3: S3) -> dict[str, str]:
    return {
        name.removeprefix("runs/one/"): s3.read(BUCKET, name).decode()
        for name in s3.objects(BUCKET)
        if not name.endswith("/")
    }


def files(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): p.read_text()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


def put(s3: S3, name: str, text: str) -> None:
    s3.client().put_object(Bucket=BUCKET, Key=f"runs/one/{name}", Body=text.encode())


def test_what_is_written_here_is_there_and_comes_back_elsewhere(bucket: S3, tmp_path: Path) -> None:
    here, elsewhere = Mirror(tmp_path / "a", RUN), Mirror(tmp_path / "b", RUN)
    assert here.pull() == []
    for name in ("plan.yaml", "metrics.jsonl", "pictures/x/a.png", "export/_done.json"):
        write(tmp_path / "a", name, name)
    assert here.push()[-2:] == ["metrics.jsonl", "export/_done.json"]
    assert there(bucket) == files(tmp_path / "a")
    assert set(elsewhere.pull()) == set(files(tmp_path / "a"))
    assert files(tmp_path / "b") == files(tmp_path / "a")


def test_only_what_changed_travels(bucket: S3, tmp_path: Path) -> None:
    here = Mirror(tmp_path, RUN)
    write(tmp_path, "plan.yaml")
    write(tmp_path, "metrics.jsonl", "1\n")
    here.push()
    bucket.requests.clear()
    assert here.push() == []
    assert bucket.requests == []
    write(tmp_path, "metrics.jsonl", "1\n2\n")
    assert here.push() == ["metrics.jsonl"]
    assert Mirror(tmp_path, RUN).pull() == []  # another job, on the same machine
    assert not [r for r in bucket.requests if r.startswith("GET") and "list-type" not in r]


def test_what_changed_there_wins(bucket: S3, tmp_path: Path) -> None:
    here = Mirror(tmp_path, RUN)
    for name in ("metrics.jsonl", "mine", "gone"):
        write(tmp_path, name, "old")
    here.push()
    put(bucket, "metrics.jsonl", "written elsewhere")
    bucket.client().delete_object(Bucket=BUCKET, Key="runs/one/gone")
    write(tmp_path, "metrics.jsonl", "written here as well")
    write(tmp_path, "mine", "new")
    again = Mirror(tmp_path, RUN)
    assert again.pull() == ["metrics.jsonl"]
    assert files(tmp_path) == {"metrics.jsonl": "written elsewhere", "mine": "new"}
    assert again.push() == ["mine"]
    assert there(bucket) == files(tmp_path)


def test_a_folder_that_was_deleted_there_begins_anew(bucket: S3, tmp_path: Path) -> None:
    """Else the marks of the old run would say that its stages are finished."""
    write(tmp_path, "pack/_done.json", "{}")
    Mirror(tmp_path, RUN).push()
    bucket.client().delete_object(Bucket=BUCKET, Key="runs/one/pack/_done.json")
    Mirror(tmp_path, RUN).pull()
    assert files(tmp_path) == {}


def test_what_other_nodes_write_is_left_to_them(bucket: S3, tmp_path: Path) -> None:
    apart = [
        *(
            "checkpoints/step-00000010/rank-00000.safetensors",
            "checkpoints/best.json",
            "shards/part-00000.parquet",
        ),
        *("pack/work_train/plan.json", "pack/queries/part-00000.parquet", "source/train/a.png"),
        *("vectors/part-00000.parquet", "evaluate/vectors/trained/queries/_vectors.json"),
        "embed/bad.parquet",
        "pretrain/bad_images.parquet",
    ]
    for name in apart:
        put(bucket, name, "there")
    put(bucket, "pack/bad_images_train.parquet", "small")
    here = Mirror(tmp_path, RUN)
    assert here.pull() == ["pack/bad_images_train.parquet"]
    for name in [*apart, ".job.lock", "pretrain/ray/x", "pictures/.a.tmp"]:
        write(tmp_path, name, "here")
    assert here.push() == []


def test_a_failing_push_keeps_all_and_the_next_one_makes_up_for_it(
    bucket: S3, tmp_path: Path
) -> None:
    here = Mirror(tmp_path, RUN)
    write(tmp_path, "a")
    write(tmp_path, "b")
    with bucket.broken("^PUT.*/b", 403, times=1000), pytest.raises(StorageError, match="refused"):
        here.push()
    assert there(bucket) == {"a": "x"}
    assert Mirror(tmp_path, RUN).push() == ["b"]


def test_inside_the_block_it_is_kept_in_step(bucket: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "EVERY_S", 0.05)
    folder = RunFolder.of("s3://mirrors/runs", "one")
    put(bucket, "plan.yaml", "there")
    with pytest.raises(KeyError), mirrored(folder):
        assert (folder.path / "plan.yaml").read_text() == "there"
        write(folder.path, "metrics.jsonl", "1\n")
        deadline = time.monotonic() + 20
        while "metrics.jsonl" not in there(bucket):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        monkeypatch.setattr(mirrors, "EVERY_S", 1000.0)
        write(folder.path, "last", "words")
        raise KeyError  # a stage that fails
    assert there(bucket) == {"plan.yaml": "there", "metrics.jsonl": "1\n", "last": "words"}


def test_a_run_whose_end_cannot_be_written_says_so(bucket: S3) -> None:
    folder = RunFolder.of("s3://mirrors/runs", "one")
    with (
        bucket.broken("^PUT", 403, times=1000),
        pytest.raises(StorageError, match=r"writing mirrors/runs/one/report\.html was refused"),
        mirrored(folder),
    ):
        write(folder.path, "report.html")


def test_a_local_run_folder_needs_no_copy(tmp_path: Path) -> None:
    folder = RunFolder.of(str(tmp_path), "one")
    with mirrored(folder) as push:
        push()
    assert folder.at("a", "b") == folder.path / "a" / "b" == tmp_path / "one" / "a" / "b"
    assert not folder.path.exists()


def test_places_of_a_remote_run(bucket: S3, tmp_path: Path) -> None:
    folder = RunFolder.of("s3://K:S@b/runs?scheme=http", "one")
    assert folder.path.is_relative_to(home())
    assert folder.checkpoints == "s3://K:S@b/runs/one/checkpoints?scheme=http"
    assert str(folder) == "s3://b/runs/one?scheme=http"
    assert (
        folder.path == RunFolder.of("s3://b/runs?scheme=http", "one").path
    )  # other keys, same place
    assert folder.path != RunFolder.of("s3://b/runs?scheme=https", "one").path
    assert RunFolder.of(f"file://{tmp_path}", "one") == RunFolder(tmp_path / "one")


def test_names_of_places() -> None:
    assert join("s3://b/a/", "c", "d") == "s3://b/a/c/d"
    assert join("s3://b/a?x=1&y=s3://z", "c") == "s3://b/a/c?x=1&y=s3://z"
    assert join("runs", "c") == join(Path("runs"), "c") == Path("runs/c")
    assert parent("s3://b/a/c?x=1") == ("s3://b/a?x=1", "c")
    assert parent(Path("/a/c")) == (Path("/a"), "c")
    for place in ("s3://b/a?x=1", "/a/b", "s3://b/a"):
        assert parent(join(place, "c")) == (join(place), "c")
    assert public("s3://K:S@b/a@c") == "s3://b/a@c"


def test_the_local_server_of_another_machine_is_forgotten(tmp_path: Path) -> None:
    """Its path may be the same here, but not what it knows."""
    state = State(tmp_path)
    state.known("local:/home/u/mlflow").sent = 10
    state.known("http://mlflow:5000").sent = 20
    state.save()
    forget_local(tmp_path)
    assert {k: v.sent for k, v in State(tmp_path).servers.items()} == {"http://mlflow:5000": 20}
    assert State(tmp_path).key == state.key
    forget_local(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_a_folder_that_never_changes_is_uploaded_once(bucket: S3, tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path, f"train/{i}.png", str(i))
    write(tmp_path, ".mark", "m")
    bucket.requests.clear()
    upload_folder(tmp_path, RUN, ".mark")
    puts = [r for r in bucket.requests if re.match("POST.*uploadId", r)]
    assert puts[-1].startswith("POST /mirrors/runs/one/.mark?")
    assert len(there(bucket)) == 21
    bucket.requests.clear()
    upload_folder(tmp_path, RUN, ".mark")
    assert {r.split()[0] for r in bucket.requests} <= {"HEAD", "GET"}
    assert json.loads(there(bucket)["train/3.png"]) == 3


def test_a_file_that_is_replaced_while_it_is_sent_is_sent_whole(
    bucket: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Mirror(tmp_path, RUN)
    write(tmp_path, "report.html", "long " * 100)
    real = mirrors.upload

    def replaced(local: Path, *arguments: object) -> None:
        write(tmp_path, "new.tmp", "short")
        (tmp_path / "new.tmp").replace(tmp_path / "report.html")
        real(local, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(mirrors, "upload", replaced)
    here.push()
    assert there(bucket)["report.html"] == "long " * 100
    monkeypatch.setattr(mirrors, "upload", real)
    assert here.push() == ["report.html"]
    assert there(bucket)["report.html"] == "short"
    assert not list(tmp_path.glob(".*.push"))


def test_a_kill_in_a_push_does_not_make_our_own_files_somebody_elses(
    bucket: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Mirror(tmp_path, RUN)
    for name in ("a.txt", "b.txt"):
        write(tmp_path, name, "old")
    real = mirrors.upload

    def killed(local: Path, fs: object, path: str, *arguments: object) -> None:
        if path.endswith("b.txt"):
            raise KeyboardInterrupt
        real(local, fs, path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(mirrors, "upload", killed)
    with pytest.raises(KeyboardInterrupt):
        here.push()
    write(tmp_path, "a.txt", "newer")
    again = Mirror(tmp_path, RUN)
    assert again.pull() == []
    assert (tmp_path / "a.txt").read_text() == "newer"
